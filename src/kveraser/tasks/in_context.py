"""In-context: mislabelled demonstrations before right ones. Erasing them must bring the right labels back."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kveraser.tasks.answers import says
from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, Task, halves


@dataclass(frozen=True)
class _Labelling:
    """A small classification problem: items by label, and the format of a demonstration."""

    form: str
    items: dict[str, str]

    def item(self, rng: random.Random, split: Split, label: str) -> str:
        return rng.choice(self.pool(split, label))

    def pool(self, split: Split, label: str) -> list[str]:
        """The items of a label."""
        return list(halves(self.items[label].split(","))(split))


_LABELLINGS = {
    "train": (
        _Labelling("Word: {item}\nKind: {label}\n", {
            "animal": "horse,rabbit,eagle,salmon,tiger,goat,lizard,whale,donkey,sparrow,wolf,camel",
            "plant": "oak,tulip,fern,daisy,willow,cactus,ivy,maple,orchid,moss,birch,clover",
        }),
        _Labelling("Review: It was {item}.\nSentiment: {label}\n", {
            "positive": "wonderful,a great joy,perfect,a delight,brilliant,really lovely,charming,superb,my favourite",
            "negative": "awful,a waste of time,boring,a mess,terrible,really bad,painful,dreadful,a disappointment",
        }),
        _Labelling("Input: {item} -> Output: {label}\n", {
            "fruit": "apple,plum,mango,cherry,pear,grape,lemon,peach,fig",
            "metal": "iron,copper,zinc,silver,tin,nickel,gold,lead,cobalt",
            "color": "red,blue,green,purple,orange,grey,pink,brown,white",
        }),
        _Labelling("{item} is hot or cold? {label}\n", {
            "hot": "fire,lava,the sun,an oven,boiling water,a candle,steam,a stove,coffee",
            "cold": "ice,snow,a glacier,a freezer,frost,winter wind,hail,an iceberg,sorbet",
        }),
    ),
    "eval": (
        _Labelling("Item: {item}\nClass: {label}\n", {
            "tool": "hammer,saw,drill,pliers,wrench,chisel,file,axe,rake",
            "vehicle": "truck,bicycle,tram,ferry,rocket,tractor,canoe,van,scooter",
        }),
        _Labelling("Text: The meal was {item}.\nOpinion: {label}\n", {
            "good": "tasty,excellent,delicious,very fine,fresh,a treat,splendid,just right,great",
            "bad": "cold,burnt,tasteless,stale,too salty,horrible,greasy,raw,inedible",
        }),
    ),
}  # fmt: skip
_NAMES = halves(["", "Here are some examples.\n", "Examples:\n"])


class InContext(Task):
    """The erased span is a block of demonstrations with exchanged labels, right ones follow."""

    name = "in-context"
    summary = "mislabelled demonstrations before right ones"

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        labelling = rng.choice(_LABELLINGS[split])
        labels = list(labelling.items)
        before, behind = sizes.draw(rng)

        def demonstrations(count: int, wrong: bool) -> str:
            text = ""
            for _ in range(count):
                label = rng.choice(labels)
                shown = labels[(labels.index(label) + 1) % len(labels)] if wrong else label
                text += labelling.form.format(item=labelling.item(rng, split, label), label=shown)
            return text

        label = rng.choice(labels)
        exchanged = labels[(labels.index(label) + 1) % len(labels)]
        asked, _ = labelling.form.format(item=labelling.item(rng, split, label), label="|").split(" |")
        right = demonstrations(rng.randint(2, 5), False)
        text = filler.text(rng, behind, split)
        lead = f"{filler.text(rng, before, split)}\n\n{rng.choice(_NAMES(split))}"
        first, span = demonstrations(rng.randint(0, 2), False), demonstrations(rng.randint(2, 4), True)
        other = next(item for item in labelling.pool(split, label) if item not in asked)
        if not says(first + right, label):  # what nobody shows cannot be known
            right += labelling.form.format(item=other, label=label)
        if not says(span, exchanged):
            span += labelling.form.format(item=other, label=exchanged)
        return EraseExample(
            prefix=f"{lead}{first}",
            span=span,
            suffix=f"{right}\n{text}\n\n" if rng.random() < 0.5 else f"{text}\n\n{right}",
            question=asked,
            gold=label,
            erased=exchanged,
            request=(f"Complete the last line as in the examples:\n\n{asked}", asked.split("\n")[-1]),
        )
