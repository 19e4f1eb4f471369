"""Closed lists the corpus draws from: common words, first names, capitals, days, months."""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
)

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "England": "London",
    "Ireland": "Dublin",
    "Scotland": "Edinburgh",
    "Belgium": "Brussels",
    "Austria": "Vienna",
    "Switzerland": "Bern",
    "Denmark": "Copenhagen",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Iceland": "Reykjavik",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Romania": "Bucharest",
    "Bulgaria": "Sofia",
    "Greece": "Athens",
    "Turkey": "Ankara",
    "Ukraine": "Kyiv",
    "Russia": "Moscow",
    "Estonia": "Tallinn",
    "Latvia": "Riga",
    "Lithuania": "Vilnius",
    "Croatia": "Zagreb",
    "Serbia": "Belgrade",
    "Slovenia": "Ljubljana",
    "Slovakia": "Bratislava",
    "Albania": "Tirana",
    "Malta": "Valletta",
    "Cyprus": "Nicosia",
    "Egypt": "Cairo",
    "Morocco": "Rabat",
    "Tunisia": "Tunis",
    "Kenya": "Nairobi",
    "Ghana": "Accra",
    "Nigeria": "Abuja",
    "Senegal": "Dakar",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "Delhi",
    "Nepal": "Kathmandu",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Jordan": "Amman",
    "Lebanon": "Beirut",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Colombia": "Bogota",
    "Ecuador": "Quito",
    "Uruguay": "Montevideo",
    "Australia": "Canberra",
}

NAMES = tuple(
    """
    Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olivia Paul Quinn
    Rosa Sam Tina Uma Victor Wendy Xena Yara Zoe Adam Bella Carlos Diana Eric Fatima George Hannah
    Ivan Julia Kevin Laura Marco Nina Oscar Petra Ravi Sofia Tom Ursula Vera Will Yusuf Zara Alice
    Bob Chloe Daniel Elena Frank Gina Hugo Ida James Karl Lucy Max Nora Otto Peter Rita Simon Tara
    Viktor Lena Mia Lukas Sara Ali Omar Aisha Chen Mei Yuki Kenji Priya Arjun Lars Freya Bjorn Astrid
    Pierre Marie Jean Louis Luca Giulia Pablo Lucia Diego Carmen Jonas Ella Finn Ruby Oliver Amelia
    """.split()
)

COMMON_WORDS = tuple(
    dict.fromkeys(
        """
    able about above accept account across action active actor adult advice afraid after again age
    agree air airport alarm album alert alive allow almost alone along already also alter always
    amber amount ample anchor ancient angel anger angle angry animal ankle answer antique anvil apart
    appear apple apply apron arch arctic area argue arm armor army around arrive arrow art ash aside
    ask asleep atlas atom attack attic aunt autumn avenue avoid awake award aware away awful axis
    baby back bacon badge bag bake baker balance ball balloon bamboo banana band bank banner bar bark
    barn barrel base basic basil basket bat bath battery battle beach bead beak beam bean bear beard
    beast beat beauty beaver become bed bee beef begin behave being bell below belt bench bend berry
    best better bicycle big bike bill bird birth biscuit bite bitter black blade blame blanket blast
    blaze blend blink block blood bloom blossom blow blue blush board boat body boil bold bolt bone
    bonus book boost boot border boss bottle bottom bounce bowl box boy brain branch brand brave bread
    break breath breeze brick bridge brief bright bring broad bronze brook broom brother brown brush
    bubble bucket build bulb bull bunch bundle burger burn burst bus bush busy butter button buyer
    cabin cable cactus cage cake calf call calm camel camera camp canal candle candy cannon canoe canvas
    cap cape captain car card care cargo carpet carrot carry cart carve case cash castle cat catch
    cattle cause cave cedar ceiling cellar cement center century cereal chain chair chalk chance change
    chapter charge charm chart chase cheap check cheek cheese cherry chess chest chew chicken chief child
    chill chimney chin chip choice choose chorus church cider cinema circle circus city civil claim clap
    class clay clean clear clerk clever cliff climb clock close cloth cloud clown club clue coach coal
    coast coat cobra coconut coffee coin cold collar color column comb come comet comfort comic common
    copper copy coral cord core corn corner cost cotton couch cough count country couple courage course
    court cousin cover cow crab craft crane crash crawl crayon cream create creek crew cricket crime crisp
    crop cross crow crowd crown cruise crumb crust cry crystal cube cup curl current curtain curve custom
    cut cycle daily dairy daisy damage damp dance danger dare dark dash data date dawn day dead deal dear
    debate debt decade decide deck deep deer define degree delay delight deliver demand dentist depth
    desert design desk detail device diamond diary dice diet differ dig dinner direct dirt dish dive
    divide dock doctor dog doll dollar dolphin domain donkey door dot double dough dove down dozen draft
    dragon drain drama draw dream dress drift drill drink drive drop drum dry duck dull dune during dust
    duty eager eagle early earn earth easel east easy eat echo edge edit effect effort egg eight elbow
    elder electric elephant elevator elf elm email ember empty enable end enemy energy engine enjoy enough
    enter equal error escape even evening event ever every exact exam example exit expert explain extra
    eye fable fabric face fact factory fade fail faint fair faith falcon fall false fame family famous
    fan fancy far farm farmer fashion fast father fault favor fear feast feather fee feed feel fellow
    fence ferry fever few fiber fiction field fifty fig fight figure file fill film filter final find
    fine finger finish fire firm fish fist fit five fix flag flame flash flat flavor flight flint float
    flock flood floor flour flow flower fluid flute fly foam focus fog fold folk follow food foot force
    forest forget fork form formal fort forty forward fossil found fountain four fox frame free freeze
    fresh friend frog front frost frozen fruit fuel full fun funny fur future gain galaxy game gap garage
    garden garlic gas gate gather gear gem general gentle giant gift ginger giraffe girl give glad glass
    globe gloom glory glove glow glue goal goat gold golf good goose gorilla grain grand grape graph grass
    gravity gray great green greet grid grin grip ground group grow guard guess guest guide guitar gull
    gun habit hair half hall hammer hand handle happen happy harbor hard harvest hat hawk hazel head heal
    health hear heart heat heavy hedge height helmet help herb herd hero hidden high hill hint history hobby
    hockey hold hole holiday hollow home honest honey hood hook hope horn horse hospital host hotel hour
    house huge human humble humor hundred hunger hunt hurry hurt ice idea ideal image impact inch include
    income index ink inner insect inside intend invent invite iron island item ivory ivy jacket jaguar jam
    jar jazz jeans jelly jewel job join joke journey joy judge juice jump jungle junior jury just keen keep
    kettle key kick kid kind king kiss kitchen kite kitten knee knife knight knock knot know label labor lace
    ladder lady lake lamb lamp land lane language lantern large laser last late laugh laundry lava law lawn
    layer lazy lead leaf learn leather leave lecture left leg legend lemon length lens leopard lesson letter
    level lever library lid life lift light lime limit line linen link lion lip liquid list listen little
    live lizard load loaf loan lobster local lock log logic lonely long look loop loose lord lose lost loud
    lounge love low loyal luck lumber lunch lung machine magic magnet maid mail main major make mammal man
    manage mango manner map maple marble march margin mark market marry mask mass master match mate matter
    mayor maze meadow meal mean measure meat medal medium meet melody melon melt member memory mend mental
    menu mercy merge merit merry metal meteor method middle might mild mile milk mill mind mine mint minute
    mirror mist mix mixer mobile model modern moment money monkey monster month mood moon moral morning
    mosaic moss most moth mother motion motor mountain mouse mouth move movie mud muffin mule muscle museum
    mushroom music myth nail name nap napkin narrow nation native nature near neat neck need needle neighbor
    nephew nerve nest net never new news nice night nine noble noise noodle north nose note novel now number
    nurse nut oak oar oasis oat object observe ocean october octopus offer office often oil old olive omelet
    once onion only open opera orange orbit orchard order organ origin ostrich otter outside oval oven owl
    owner ox oyster pack paddle page paint pair palace palm pan panda panel panic paper parade parcel parent
    park parrot part party pass past pasta paste path patient pattern pause peace peach peak peanut pear
    pearl pebble pen pencil penguin people pepper perfect period person pet phone photo phrase piano pick
    picnic picture piece pig pigeon pillow pilot pin pine pink pioneer pipe pirate pitch pizza place plain
    plan plane planet plant plastic plate play plaza plenty plot plum plus pocket poem poet point polar
    pole police polish polite pond pony pool poor poppy porch port portal potato pottery pound powder power
    praise press pretty price pride prince print prison prize problem process proof proud public pull pulse
    pump pumpkin punch pupil puppet puppy pure purple purse push puzzle pyramid quail quality quarter queen
    quest quick quiet quilt quit quiz quote rabbit race radar radio raft rail rain raise ranch range rapid
    rare raven razor reach read ready real reason recipe record red reef reflect region relax remain remind
    remote rent repair repeat reply report rescue rest result return reward rhythm ribbon rice rich riddle
    ride ridge right ring ripe rise rival river road roast robin robot rock rocket role roll roof room root
    rope rose rough round route royal rubber ruby rude rug rule ruler run rural rush rust sack sad saddle
    safe sail salad salmon salt same sample sand sauce sauna save scale scarf scene school science score
    scout scrap screen screw sea seal search season seat second secret seed select sell send senior sense
    series serve seven shade shadow shake shallow shape share shark sharp sheep sheet shelf shell shelter
    shield shift shine ship shirt shock shoe shop shore short shoulder shout shovel show shower shrimp shut
    shy side sight sign silent silk silver simple sing sink sister six size skate sketch ski skill skin skirt
    skull sky slate sleep slice slide slim slope slow small smart smell smile smoke smooth snack snail snake
    snow soap soccer social sock soda sofa soft soil solar soldier solid solve song sorry sort soul sound
    soup source south space spade spare spark speak special speed spell spice spider spin spirit split
    spoon sport spot spray spread spring square squid stable staff stage stair stamp stand star start state
    station statue stay steam steel stem step stick still sting stir stock stone stool stop storm story
    stove straw stream street stretch string stripe strong student study stuff style subject sugar suit
    summer sun super supper surf swamp swan swap sweater sweet swim swing switch sword symbol syrup system
    table tail tailor talent talk tall tank tape target task taste taxi tea teach team tear tell temple ten
    tennis tent term test text thank theater theme thick thief thin thing think thirty thorn thread three
    throat throne throw thumb thunder ticket tide tidy tie tiger tight tile timber time tin tiny tired title
    toad toast today toe token tomato tone tongue tool tooth topic torch total touch tough tour tower town toy
    trace track trade trail train travel tray treasure treat tree trend trial tribe trick trip trophy truck
    true trumpet trunk trust truth try tube tulip tuna tunnel turkey turn turtle twelve twenty twin twist two
    type uncle under union unique unit until update upper urban urgent useful usual vacuum valley value van
    vanilla vase vast vault velvet vessel veteran victory video view village vine violet violin virus visit
    vital voice volcano volume vote voyage wagon waist wait walk wall walnut walrus want warm warn wash wasp
    waste watch water wave wax way weak wealth weather weave web wedding week weigh welcome west whale wheat
    wheel when while whisper whistle white whole wide wife wild willow win wind window wine wing winner winter
    wire wise wish witch wizard wolf woman wonder wood wool word work world worm worry wrap wrist write wrong
    yard yarn year yellow yesterday yogurt young youth zebra zero zigzag zone zoo
    """.split()
    )
)
