"""Class names that are prompted with other words than a data set's own, in the order of its labels.

Source: the prompts published with CLIP (Radford et al., "Learning transferable visual models from natural language
supervision", 2021), as used in Ilharco et al., ICLR 2023; KMNIST and Fashion-MNIST from their publishers.
"""


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(";"))


DIGITS = tuple("0123456789")

EUROSAT = {  # by the folders of the published archive
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}

# The word by alphabet, as the archive's folders are; prompts with several words for one emotion keep the first.
FER2013 = {
    "angry": "angry",
    "disgust": "disgusted",
    "fear": "fearful",
    "happy": "happy",
    "neutral": "neutral",
    "sad": "sad",
    "surprise": "surprised",
}

FASHION = _names("T-shirt/top; Trouser; Pullover; Dress; Coat; Sandal; Shirt; Sneaker; Bag; Ankle boot")

KMNIST = _names("o; ki; su; tsu; na; ha; ma; ya; re; wo")

PCAM = ("lymph node", "lymph node containing metastatic tumor tissue")

GTSRB = _names(
    """
red and white circle 20 kph speed limit; red and white circle 30 kph speed limit; red and white circle 50 kph
speed limit; red and white circle 60 kph speed limit; red and white circle 70 kph speed limit; red and white
circle 80 kph speed limit; end / de-restriction of 80 kph speed limit; red and white circle 100 kph speed limit;
red and white circle 120 kph speed limit; red and white circle red car and black car no passing; red and white
circle red truck and black car no passing; red and white triangle road intersection warning; white and yellow
diamond priority road; red and white upside down triangle yield right-of-way; stop; empty red and white circle;
red and white circle no truck entry; red circle with white horizonal stripe no entry; red and white triangle
with exclamation mark warning; red and white triangle with black left curve approaching warning; red and white
triangle with black right curve approaching warning; red and white triangle with black double curve approaching
warning; red and white triangle rough / bumpy road warning; red and white triangle car skidding / slipping
warning; red and white triangle with merging / narrow lanes warning; red and white triangle with person digging
/ construction / road work warning; red and white triangle with traffic light approaching warning; red and white
triangle with person walking warning; red and white triangle with child and person walking warning; red and
white triangle with bicyle warning; red and white triangle with snowflake / ice warning; red and white triangle
with deer warning; white circle with gray strike bar no speed limit; blue circle with white right turn arrow
mandatory; blue circle with white left turn arrow mandatory; blue circle with white forward arrow mandatory;
blue circle with white forward or right turn arrow mandatory; blue circle with white forward or left turn arrow
mandatory; blue circle with white keep right arrow mandatory; blue circle with white keep left arrow mandatory;
blue circle with white arrows indicating a traffic circle; white circle with gray strike bar indicating no
passing for cars has ended; white circle with gray strike bar indicating no passing for trucks has ended
"""
)

FLOWERS = _names(
    """
pink primrose; hard-leaved pocket orchid; canterbury bells; sweet pea; english marigold; tiger lily; moon
orchid; bird of paradise; monkshood; globe thistle; snapdragon; colt's foot; king protea; spear thistle; yellow
iris; globe flower; purple coneflower; peruvian lily; balloon flower; giant white arum lily; fire lily;
pincushion flower; fritillary; red ginger; grape hyacinth; corn poppy; prince of wales feathers; stemless
gentian; artichoke; sweet william; carnation; garden phlox; love in the mist; mexican aster; alpine sea holly;
ruby-lipped cattleya; cape flower; great masterwort; siam tulip; lenten rose; barbeton daisy; daffodil; sword
lily; poinsettia; bolero deep blue; wallflower; marigold; buttercup; oxeye daisy; common dandelion; petunia;
wild pansy; primula; sunflower; pelargonium; bishop of llandaff; gaura; geranium; orange dahlia; pink and yellow
dahlia; cautleya spicata; japanese anemone; black-eyed susan; silverbush; californian poppy; osteospermum;
spring crocus; bearded iris; windflower; tree poppy; gazania; azalea; water lily; rose; thorn apple; morning
glory; passion flower; lotus; toad lily; anthurium; frangipani; clematis; hibiscus; columbine; desert-rose; tree
mallow; magnolia; cyclamen; watercress; canna lily; hippeastrum; bee balm; air plant; foxglove; bougainvillea;
camellia; mallow; mexican petunia; bromelia; blanket flower; trumpet creeper; blackberry lily
"""
)
