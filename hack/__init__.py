"""What a person runs by hand: training of the embedded model and conversion tools."""
