"""Stories of Tinytown: characters who move, carry and give; every sentence must be possible when it is told.

A story names its characters and places, puts every character and object somewhere, tells events, and closes
with one sentence that states where somebody or something ended up. Each event is drawn uniformly from what
the actor can do now: choose the actor, then the kind of action among the possible ones, then its object, then
the wording. To reach the entropy of the stories a model must therefore track who is where and who holds what.
The closing statement is implied by the story: only its subject is a choice.
"""

from __future__ import annotations

from math import log2
from typing import Any

from llmcourse.data.town_choices import Choose, draw_in_order
from llmcourse.data.town_settings import Range, TownSettings, range_size
from llmcourse.data.town_story_language import CLOSINGS, StoryLanguage, introduction
from llmcourse.data.town_story_reader import StoryReading, StoryScore
from llmcourse.data.town_world import World


class Stories:
    """The grammar of stories: `write` a random one, `read` one back, `score` anybody's."""

    def __init__(self, settings: TownSettings) -> None:
        self.settings = settings
        self.language = StoryLanguage(settings)

    def write(self, choose: Choose) -> tuple[str, dict[str, Any]]:
        """Write a story; return its text and the final state of its world (see `World.facts`)."""
        settings, language = self.settings, self.language
        names = draw_in_order(choose, list(language.names), _number(choose, settings.story_characters))
        places = draw_in_order(choose, list(language.places), _number(choose, settings.story_places))
        world = World(names, places)
        sentences = [introduction(names, places)]
        for name in names:
            world.place_of[name] = places[choose(len(places))]
            wordings = language.openings["stand"]
            sentences.append(wordings[choose(len(wordings))].format(c=name, p=world.place_of[name]))
        things = draw_in_order(choose, list(language.objects), _number(choose, settings.story_objects))
        sentences += [self._open_object(choose, world, thing) for thing in things]
        for _ in range(_number(choose, settings.story_events)):
            sentences.append(self._tell_event(choose, world))
        closings = world.closings()
        what, values = closings[choose(len(closings))]
        sentences.append(CLOSINGS[what].format(**values))
        return " ".join(sentences), world.facts()

    def _open_object(self, choose: Choose, world: World, thing: str) -> str:
        spot = choose(len(world.places) + len(world.names))
        if spot < len(world.places):
            what, values = "lie", {"o": thing, "p": world.places[spot]}
            world.lies_in[thing] = world.places[spot]
        else:
            what, values = "hold", {"o": thing, "c": world.names[spot - len(world.places)]}
            world.holder_of[thing] = values["c"]
        wordings = self.language.openings[what]
        return wordings[choose(len(wordings))].format(**values)

    def _tell_event(self, choose: Choose, world: World) -> str:
        options = world.options(world.names[choose(len(world.names))], self.language.moods)
        action = list(options)[choose(len(options))]
        event = options[action][choose(len(options[action]))]
        wordings = self.language.actions[action]
        world.happen(action, event)
        return wordings[choose(len(wordings))].format(**event)

    def read(self, text: str) -> tuple[float, dict[str, Any]]:
        """Recover a story's information in bits and its facts from its text alone.

        Raises:
            ValueError: if the grammar cannot write this text.
        """
        reading, settings = StoryReading(self.language, text), self.settings
        score, world = reading.score, reading.world
        if score.problem is not None:
            raise ValueError(f"not a story: sentence {score.sentence}: {score.problem}")
        bits = reading.bits
        for number, limits, what in (
            (len(world.names), settings.story_characters, "characters"),
            (len(world.places), settings.story_places, "places"),
            (len(world.lies_in) + len(world.holder_of), settings.story_objects, "objects"),
            (reading.events, settings.story_events, "events"),
        ):
            if not limits[0] <= number <= limits[1]:
                raise ValueError(f"not a story: {number} {what}, outside {limits[0]} to {limits[1]}")
            bits += log2(range_size(limits))
        return bits, world.facts()

    def score(self, text: str) -> StoryScore:
        """Judge any text as a story, for example a prompt with a model's continuation.

        White space at the ends and the numbers of characters, places, objects and events are free here.
        """
        return StoryReading(self.language, text.strip()).score


def _number(choose: Choose, limits: Range) -> int:
    """Draw a number from a closed range."""
    return limits[0] + choose(range_size(limits))
