"""The world of a story: who is where, who holds what, who feels how, and what can happen next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class World:
    """Where everybody and everything is. Mutable: events change it."""

    names: list[str]
    places: list[str]
    place_of: dict[str, str] = field(default_factory=dict)
    """Character -> place."""
    holder_of: dict[str, str] = field(default_factory=dict)
    """Object -> the character who carries it; an object stands either here or in `lies_in`."""
    lies_in: dict[str, str] = field(default_factory=dict)
    """Object -> the place where it lies."""
    mood_of: dict[str, str] = field(default_factory=dict)
    """Character -> mood last told; absent before."""
    greeted: set[tuple[str, str]] = field(default_factory=set)
    """Pairs (who, whom): each greeting happens once."""
    waited: str | None = None
    """The actor, if the last event was waiting: nobody waits twice in a row."""

    def options(self, actor: str, moods: tuple[str, ...]) -> dict[str, list[dict[str, str]]]:
        """What the actor can do now: action -> the field values of each way to do it. No list is empty."""
        here = self.place_of[actor]
        mood = self.mood_of.get(actor)
        options = {
            "go": [{"c": actor, "q": here, "p": place} for place in self.places if place != here],
            "feel": [{"c": actor, "m": m} for m in moods if m != mood],
        }
        if self.waited != actor:
            options["wait"] = [{"c": actor, "p": here}]
        lying = [{"c": actor, "o": o, "p": here} for o, place in self.lies_in.items() if place == here]
        if lying:
            options["take"] = lying
        held = [o for o, holder in self.holder_of.items() if holder == actor]
        others = [name for name in self.names if name != actor and self.place_of[name] == here]
        if held:
            options["drop"] = [{"c": actor, "o": o, "p": here} for o in held]
            if others:
                options["give"] = [
                    {"c": actor, "o": o, "d": other, "p": here} for o in held for other in others
                ]
        greetable = [
            {"c": actor, "d": other, "p": here} for other in others if (actor, other) not in self.greeted
        ]
        if greetable:
            options["greet"] = greetable
        return options

    def happen(self, action: str, event: dict[str, str]) -> None:
        """Change the world by an event, possible or not (a model's story goes on after an impossible one)."""
        actor = event["c"]
        self.waited = actor if action == "wait" else None
        if action == "go":
            self.place_of[actor] = event["p"]
        elif action == "feel":
            self.mood_of[actor] = event["m"]
        elif action == "take":
            self.lies_in.pop(event["o"], None)
            self.holder_of[event["o"]] = actor
        elif action == "drop":
            self.holder_of.pop(event["o"], None)
            self.lies_in[event["o"]] = self.place_of[actor]
        elif action == "give":
            self.lies_in.pop(event["o"], None)
            self.holder_of[event["o"]] = event["d"]
        elif action == "greet":
            self.greeted.add((actor, event["d"]))

    def closings(self) -> list[tuple[str, dict[str, str]]]:
        """The true closing statements, in a fixed order: characters' places, known moods, objects."""
        true = [("place", {"c": c, "p": self.place_of[c]}) for c in self.names]
        true += [("mood", {"c": c, "m": self.mood_of[c]}) for c in self.names if c in self.mood_of]
        true += [("object_place", {"o": o, "p": place}) for o, place in self.lies_in.items()]
        true += [("object_holder", {"o": o, "c": holder}) for o, holder in self.holder_of.items()]
        return true

    def facts(self) -> dict[str, Any]:
        """The final state: `places`, `moods` of characters, and `objects` ("in the barn" or "with Anna")."""
        objects = {o: f"in the {place}" for o, place in self.lies_in.items()}
        objects |= {o: f"with {holder}" for o, holder in self.holder_of.items()}
        return {"places": dict(self.place_of), "moods": dict(self.mood_of), "objects": objects}


def why_impossible(world: World, action: str, event: dict[str, str]) -> str:
    """Say why an event cannot happen now; for events that are not among the options of their actor."""
    actor, thing, other = event["c"], event.get("o"), event.get("d")
    here = world.place_of[actor]
    if thing is not None and thing not in world.holder_of and thing not in world.lies_in:
        return f"the {thing} does not belong to this story"
    if other is not None and world.place_of.get(other) != here:
        return f"{other} is not with {actor} in the {here}"
    if action == "take" and world.lies_in.get(str(thing)) != here:
        return f"the {thing} does not lie in the {here}, where {actor} is"
    if action in ("drop", "give") and world.holder_of.get(str(thing)) != actor:
        return f"{actor} does not have the {thing}"
    if action == "go" and event["p"] not in world.places:
        return f"the {event['p']} does not belong to this story"
    if (told := event.get("q" if action == "go" else "p", here)) != here:
        return f"{actor} is in the {here}, not in the {told}"
    if action == "go":
        return f"{actor} is in the {here} already"
    if action == "wait":
        return f"{actor} has just waited"
    if action == "feel":
        return f"{actor} is {event['m']} already"
    if action == "greet":
        return f"{actor} has greeted {other} already"
    return f"{actor} cannot give the {thing} to {other}"
