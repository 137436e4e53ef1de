"""Names and values that templates are filled with, dealt to the two splits."""

from kveraser.tasks.base import halves

PLACES = halves(
    "Oslo,Porto,Kyoto,Lagos,Quito,Turin,Perth,Cairo,Lima,Riga,Delhi,Seoul,Bergen,Accra,Osaka,Tunis,Havana,Denver,"
    "Geneva,Krakow,Malmo,Nairobi,Valencia,Dublin,Ankara,Bogota,Leipzig,Montreal,Hanoi,Tampere".split(",")
)
PEOPLE = halves(
    "Maria,Jonas,Aisha,Pedro,Ingrid,Kenji,Fatima,Lukas,Priya,Oskar,Elena,Tomas,Amara,Felix,Yuki,Hassan,Clara,Viktor,"
    "Noor,Samuel,Greta,Rafael,Leila,Anton,Sofia,Bruno,Hanna,Mateo,Olga,Daniel".split(",")
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
