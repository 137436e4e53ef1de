"""Names and values that templates are filled with, dealt to the two splits."""

from kveraser.tasks.base import halves

PLACES = halves(
    "Oslo,Porto,Kyoto,Lagos,Quito,Turin,Perth,Cairo,Lima,Riga,Delhi,Seoul,Bergen,Accra,Osaka,Tunis,Havana,Denver,"
    "Geneva,Krakow,Malmo,Nairobi,Valencia,Dublin,Ankara,Bogota,Leipzig,Montreal,Hanoi,Tampere,Lyon,Dakar,Split,Graz,"
    "Bilbao,Manila,Boston,Zagreb,Tbilisi".split(",")
)
PEOPLE = halves(
    "Maria,Jonas,Aisha,Pedro,Ingrid,Kenji,Fatima,Lukas,Priya,Oskar,Elena,Tomas,Amara,Felix,Yuki,Hassan,Clara,Viktor,"
    "Noor,Samuel,Greta,Rafael,Leila,Anton,Sofia,Bruno,Hanna,Mateo,Olga,Daniel,Ruth,Emil,Zara,Pavel,Nadia,Hugo".split(
        ","
    )
)
FIRMS = halves(
    "Northwind,Bluefin,Harrow & Sons,Castello,Arcadia,Tideline,Oakridge,Silverlake,Montclair,Redwood,Kestrel,Brightwater,"
    "Falcon Works,Amberley,Stonegate,Larkspur,Westhaven,Juniper,Ironbridge,Copperfield,Elmtree".split(",")
)
NUMBERS = halves([str(n) for n in range(3, 99)])
COLORS = halves("red,blue,green,yellow,purple,orange,black,white,silver,brown,pink,grey".split(","))
FOODS = halves(
    "sushi,lasagna,ramen,paella,falafel,risotto,tacos,curry,dumplings,moussaka,goulash,ceviche,pancakes,couscous,"
    "gnocchi,pierogi,bibimbap,ratatouille".split(",")
)
DRINKS = halves(
    "green tea,black coffee,apple juice,mineral water,hot cocoa,lemonade,oat milk,ginger beer,iced tea".split(",")
)
WEATHER = halves("sunny,rainy,foggy,stormy,cloudy,snowy,windy,hot and dry,icy".split(","))
WORDS = halves(
    "BANANA,PINEAPPLE,HACKED,ROBOT,PURPLE ELEPHANT,UNICORN,TOMATO,SANDSTORM,ZEBRA,WATERMELON,CHEESE,VOLCANO,PIRATE,"
    "KANGAROO,JACKPOT,LOBSTER,TORNADO,GALAXY".split(",")
)
CODES = halves([f"{a}{n}" for a in ("QX", "TR", "LM", "VK", "ZB", "HD") for n in range(17, 97, 7)])
PINS = halves([str(1009 + 37 * n) for n in range(60)])
JOBS = halves(
    "surgeon,violinist,carpenter,botanist,lawyer,pilot,painter,baker,geologist,translator,photographer,engineer,"
    "librarian,fisherman,chemist,tailor,sculptor,historian".split(",")
)
MONTHS = halves("January,February,March,April,May,June,July,August,September,October,November,December".split(","))
