"""Longer texts the embedded model learns by heart: a paragraph on each topic, and the stories."""

TOPICS: dict[str, str] = {
    "the sun": (
        "The sun is a star at the center of our solar system. It is a very hot ball of gas, and it gives "
        "us light and heat. Plants use its light to grow, and animals eat the plants. The light of the "
        "sun needs about eight minutes to reach the earth. Without the sun there would be no life here."
    ),
    "the moon": (
        "The moon travels around the earth in about one month. It has no light of its own, so we see the "
        "light of the sun on its surface. The moon pulls on the water of the sea, and this makes the "
        "tides. People first walked on the moon in the summer of a year they never forgot."
    ),
    "rain": (
        "Rain begins when the sun warms the water of the sea. The water rises into the air as vapor. High "
        "up the air is cold, so the vapor turns into small drops and makes clouds. When the drops become "
        "too heavy, they fall to the ground as rain. Then the water flows back to the sea."
    ),
    "snow": (
        "Snow is made of small crystals of ice. They form in cold clouds when water vapor freezes. Each "
        "crystal has six sides, and no two look quite the same. When the ground is cold, the snow stays "
        "and covers everything in white. In spring it melts, and the water feeds the rivers."
    ),
    "wind": (
        "Wind is moving air. The sun warms some places more than others, and warm air rises. Cold air "
        "then flows in to take its place, and we feel this as wind. Wind can turn a mill, push a boat "
        "or carry seeds far away. A very strong wind is called a storm."
    ),
    "bread": (
        "Bread is made from flour, water, salt and yeast. First you mix everything and work the dough "
        "with your hands. Then the dough rests in a warm place, and the yeast makes it rise. After an "
        "hour you bake it in a hot oven. Good bread has a brown crust and a soft inside."
    ),
    "coffee": (
        "Coffee is a drink made from the seeds of a small tree. The seeds are dried and then roasted "
        "until they are dark brown. You grind them and pour hot water over the powder. Coffee has a "
        "strong taste and keeps many people awake. It is best when it is fresh and hot."
    ),
    "tea": (
        "Tea is made from the leaves of a plant that grows in warm places. The leaves are picked by hand "
        "and then dried. You pour hot water over them and wait a few minutes. Green tea is light, and "
        "black tea is strong. After water, tea is the most popular drink in the world."
    ),
    "bicycles": (
        "A bicycle has two wheels, a frame and a seat. You push the pedals with your feet, and a chain "
        "turns the back wheel. Riding a bicycle is healthy, quiet and cheap. It needs no fuel, and it is "
        "often the fastest way through a busy city. Wear a helmet and check your brakes first."
    ),
    "trains": (
        "A train is a row of cars that runs on rails. The first trains were pulled by steam engines and "
        "were slow and loud. Today most trains use electric power, and some are faster than any car. A "
        "train can carry many people with little energy. That makes it a clean way to travel."
    ),
    "diffusion language models": (
        "A diffusion language model writes text in a different way. It starts with a row of masks and "
        "fills them in step by step. In each step it looks at the whole text, to the left and to the "
        "right, and keeps the words it is most sure about. Several words can be written at the same "
        "time. That can make it faster than a model that writes one word after another."
    ),
    "kserve": (
        "KServe is a tool that serves machine learning models on Kubernetes. You describe the model in a "
        "small file, and KServe starts a server for it. It can add more servers when there is more work "
        "and remove them when there is less. It speaks a standard protocol, so that clients do not need "
        "to know which model is behind it."
    ),
    "kubernetes": (
        "Kubernetes is a system that runs programs in containers on many machines. You say what you want "
        "to run, and it finds a place for it. When a program stops, Kubernetes starts it again. When a "
        "machine fails, it moves the work to another one. This keeps a service alive without much help."
    ),
    "neural networks": (
        "A neural network is a program that learns from examples. It is made of many simple units in "
        "layers, and each unit adds up numbers from the layer before it. During training the network "
        "makes a guess, sees its error and changes its weights a little. After many steps it can "
        "find patterns in pictures, sound or text."
    ),
    "computers": (
        "A computer is a machine that follows instructions. It keeps numbers in its memory and works on "
        "them very fast. Everything on the screen, from text to pictures, is made of numbers. A program "
        "tells the computer what to do, one step after another. Today a phone is stronger than the "
        "big computers of the past."
    ),
    "the internet": (
        "The internet is a network that joins computers all over the world. A message is cut into small "
        "packets, and each packet finds its own way. At the end the packets are put together again. "
        "People use the internet to write, to learn, to buy things and to talk with friends. It never "
        "sleeps."
    ),
    "dogs": (
        "Dogs have lived with people for thousands of years. They come from wolves, but they are much "
        "more friendly. A dog can guard a house, find a lost child or help a blind person. Dogs need "
        "food, water, a long walk every day and a lot of love. A happy dog moves its tail."
    ),
    "cats": (
        "Cats are small hunters with soft fur and sharp claws. They see well in the dark and hear the "
        "smallest sound. A cat sleeps for most of the day and likes warm places. It washes itself with "
        "its tongue. Cats are quiet friends, but they do what they want."
    ),
    "birds": (
        "Birds are animals with feathers, wings and a beak. Most of them can fly because their bones are "
        "light. They build nests and lay eggs. In autumn many birds fly to warm countries, and in spring "
        "they come back. Early in the morning you can hear them sing."
    ),
    "bees": (
        "Bees are small insects that live in large groups. They fly from flower to flower and collect "
        "sweet juice, which they turn into honey. On the way they carry pollen, so that plants can make "
        "fruit and seeds. A bee dances to tell the others where the flowers are. Without bees we would "
        "have much less food."
    ),
    "whales": (
        "Whales live in the sea, but they are not fish. They breathe air and feed their young with milk. "
        "The blue whale is the largest animal that has ever lived. Whales sing to each other under "
        "water, and the sound travels very far. Some of them dive for more than an hour."
    ),
    "elephants": (
        "Elephants are the largest animals on land. They use the long trunk to drink, to eat and to say "
        "hello. They live in families led by an old mother who remembers where to find water. "
        "Elephants eat grass, leaves and fruit all day long. They can live for sixty years."
    ),
    "trees": (
        "Trees are tall plants with a trunk of wood. Their roots take water from the ground, and their "
        "leaves use the light of the sun to make sugar. Trees clean the air and give us fruit, wood and "
        "shade. In autumn many of them lose their leaves. Some trees live for thousands of years."
    ),
    "flowers": (
        "Flowers help plants to make seeds. Their bright colors and sweet smell bring bees and other "
        "insects. The insects carry pollen from one flower to the next. Then the flower becomes a fruit "
        "with seeds inside. People give flowers to each other to say thank you or to show love."
    ),
    "the ocean": (
        "The ocean covers most of the earth. Its water is salty, because rivers carry salt from the "
        "land into it. Near the surface it is warm and full of light, but deep down it is cold and "
        "dark. Fish, whales and many strange animals live there. The ocean also keeps our weather mild."
    ),
    "rivers": (
        "A river begins in the hills as a small stream. Other streams join it, and it grows wide and "
        "slow. It carries sand and stones on its way to the sea. Many old cities stand beside a river, "
        "because people need water to drink, to travel and to grow food."
    ),
    "mountains": (
        "Mountains are very high places. They grow when large pieces of the earth push against each "
        "other, which takes millions of years. The air on a high mountain is thin and cold, and snow "
        "may stay all summer. Many people climb mountains for the view and the quiet."
    ),
    "volcanoes": (
        "A volcano is a mountain with an opening to the hot inside of the earth. Rock there is so hot "
        "that it melts. When the pressure is too high, the melted rock breaks out as lava, with smoke "
        "and ash. Later the ground around a volcano is very good for plants."
    ),
    "music": (
        "Music is sound in time. A melody is a row of notes that we can sing, and rhythm tells us how "
        "long each note is. People make music with the voice and with instruments such as the piano, "
        "the guitar or the drum. Music can make us happy, sad or calm. Every culture has its own songs."
    ),
    "chess": (
        "Chess is a game for two players on a board with sixty four squares. Each player has sixteen "
        "pieces, and each kind of piece moves in its own way. The aim is to attack the king of the "
        "other player so that it can not escape. A good player thinks many moves ahead."
    ),
    "football": (
        "Football is the most popular game in the world. Two teams of eleven players try to kick a ball "
        "into the goal of the other team. Only the player in the goal may use the hands. A game lasts "
        "ninety minutes with a short break in the middle. The team with more goals wins."
    ),
    "books": (
        "A book keeps words so that others can read them later. Long ago books were written by hand and "
        "were very expensive. Then people learned to print them, and soon everyone could own one. A "
        "good book can teach you something, make you laugh or take you to another world."
    ),
    "schools": (
        "A school is a place where children learn together. They learn to read, to write and to work "
        "with numbers. They also learn about nature, history and art. A good teacher asks many questions "
        "and listens to the answers. At school many people find friends for life."
    ),
    "sleep": (
        "Sleep gives the body and the mind time to rest. While we sleep, the brain puts the memories of "
        "the day in order. Adults need about eight hours of sleep, and children need more. A dark, cool "
        "and quiet room helps. Without enough sleep we are slow, sad and often ill."
    ),
    "water": (
        "Water is the most important thing for life. It can be solid as ice, liquid as rain or a gas as "
        "vapor. Our body is made mostly of water, so we need to drink every day. Plants and animals "
        "need it too. Clean water is precious, so we should not waste it."
    ),
    "electricity": (
        "Electricity is the flow of very small charges through a wire. It gives us light, heat and power "
        "for machines. We make it from wind, water, the sun or fuel. It travels through long lines to "
        "our houses. Electricity is useful, but it can be dangerous, so never touch a broken wire."
    ),
    "time": (
        "Time tells us the order in which things happen. A day is one turn of the earth, and a year is "
        "one trip around the sun. We cut the day into hours, minutes and seconds. Clocks help us to meet "
        "at the same moment. Time can not be stopped and can not be bought."
    ),
    "colors": (
        "We see colors because light has many different waves. Red, yellow and blue can be mixed to make "
        "the others. Blue and yellow make green, and red and yellow make orange. White light holds all "
        "colors, as you can see in a rainbow. At night, without light, we see almost no color at all."
    ),
    "the seasons": (
        "There are four seasons in a year. In spring the plants begin to grow, and the days become "
        "longer. Summer is warm and bright. In autumn the leaves turn red and brown and fall. Winter is "
        "cold, and the nights are long. We have seasons because the earth leans to one side on its "
        "way around the sun."
    ),
    "friendship": (
        "A friend is a person you like and trust. Friends listen to each other, share good and bad "
        "times and help without being asked. A true friend tells you the truth, even when it is hard. "
        "Friendship needs time and care, like a garden. It is one of the best things in life."
    ),
    "soup": (
        "Soup is easy to make. Cut an onion, a carrot and a potato into small pieces. Cook them in a "
        "little oil for five minutes and then add water and salt. Let everything boil slowly until it "
        "is soft. At the end add some pepper and fresh herbs. Eat the soup hot with a piece of bread."
    ),
    "apples": (
        "Apples grow on trees in places with warm summers and cold winters. In spring the trees are full "
        "of white flowers, and in autumn the fruit is ripe. Apples can be red, green or yellow, sweet or "
        "sour. You can eat them fresh, bake them in a cake or press them for juice."
    ),
}

STORIES: dict[str, str] = {
    "dog": (
        "One day {name} found a small dog in the park. The dog was wet and hungry. {name} took it home "
        "and gave it warm milk and bread. Soon the dog was strong and happy. From that day on {name} and "
        "the dog were best friends, and they walked in the park every morning."
    ),
    "cat": (
        "{name} had a gray cat that loved to climb. One evening the cat sat on the highest tree and was "
        "afraid to come down. {name} brought a ladder and a piece of fish. Step by step the cat came "
        "down. That night it slept on the bed of {name} and did not move until morning."
    ),
    "bird": (
        "In spring {name} saw a little bird with a broken wing. {name} made a nest in a box and fed the "
        "bird every day. After three weeks the wing was strong again. {name} opened the window, and the "
        "bird flew up into the blue sky. Each year it came back to sing."
    ),
    "horse": (
        "{name} lived on a farm with a brown horse. One night there was a storm, and the bridge broke. "
        "A child on the other side was ill and needed a doctor. {name} and the horse went through the "
        "cold river and brought help. The next day the whole village came to say thank you."
    ),
    "dragon": (
        "High on a mountain lived a dragon that everyone feared. Only {name} climbed up to see it. The "
        "dragon was not angry at all, it was just lonely. {name} told it stories and shared some bread. "
        "Since then the dragon warms the houses of the village in every winter."
    ),
    "robot": (
        "{name} built a robot out of old parts. At first the robot could only say hello. {name} taught "
        "it to count, to paint and to water the plants. One morning the robot made breakfast all by "
        "itself. The toast was black, but {name} was very proud and ate every bite."
    ),
    "fox": (
        "A clever fox took one egg every night. {name} wanted to know why and followed it into the "
        "forest. There {name} saw four small foxes that were very thin. From then on {name} left some "
        "food at the edge of the forest, and the eggs were never touched again."
    ),
    "bear": (
        "{name} was looking for berries when a bear came out of the forest. They both were so surprised "
        "that they sat down. Then {name} slowly pushed the basket over to the bear. The bear ate half of "
        "the berries, left the other half and walked away. {name} never forgot that kind bear."
    ),
    "ship": (
        "{name} wanted to see the world and went to sea on a small ship. For ten days there was only "
        "water and sky. Then a green island came into view. {name} found sweet fruit and friendly people "
        "there. After a year {name} came home with many stories and a box full of letters."
    ),
    "star": (
        "Every night {name} looked at the same little star. One night the star fell into the garden and "
        "was cold and afraid. {name} kept it warm in both hands until it began to shine again. Then the "
        "star rose back to the sky, and it shines a bit brighter when {name} looks up."
    ),
}
