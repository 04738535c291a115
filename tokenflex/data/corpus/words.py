"""The words that are rendered into images: common English nouns of three to five letters, split by word."""

TRAIN_WORDS = tuple(
    """
    ant apple arm art axe baby back bag ball band bank barn base bath bean bear bed bee bell belt bike bird
    boat body bone book boot bow bowl box boy brain bread brick broom brush bus cable cage cake camp candy cap
    card cart cat cave chain chair chalk cheek chess chest chin city clay cliff clock cloth cloud coal coat
    coin comb cook coral corn couch cow crab crane cream crow crown cube cup curb dance dawn deer desk dish
    dock dog doll door dot dove dream dress drum duck dust eagle ear earth egg elbow elm face fan farm fence
    fern field fig film fire fish flag flame fleet flock floor flute fog food foot fork fort fox frame frog
    fruit fur gate ghost giant gift girl glass globe glove goat gold goose grape guard gulf gum hair hall ham
    hand harp hat hawk head heart heel helm hen herb hill hive hook horn house ice inch ink iron isle jade jam
    jar jaw jazz jet jewel juice jump key king kite knee knot lace lake lamb lamp land lark lawn leaf leg
    lemon lens lid light lily limb line lion lip list lock log loom lung maid mall map mask mast meal meat
    melon metal mice mill mine mint moon moss moth motor mouse mouth mud mug mule nail name neck nest net
    night
    """.split()
)
EVAL_WORDS = tuple(
    """
    noon nose note novel nurse oak oar ocean oil olive onion orb oven owl page paint palm pan paper park path
    peach pear pen piano pig pilot pin pipe plane plant plate plum pond pony pool queen quilt rail rain ring
    river road robe rock roof room root rope rose ruby sail salt sand sea seed shark sheep shell ship shirt
    shoe silk sink skin sky snail snow soap sock song soup spoon star steam stone stove sugar sun swan table
    tail tape tea tent tiger toe tooth torch towel tower town toy train tray tree truck tube tulip vase veil
    vest wall watch water wave web whale wheat wheel wind wing wolf wood wool yard zebra
    """.split()
)
