"""Which columns a row of preference data has: the accepted forms, told apart by their column names.

A form says what a row means; where the rows lie (parquet, JSON lines, an archive, the hub) is another question.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Alternatives = tuple[tuple[str, ...], ...]

COLUMN_FLAGS = ("caption_column", "image_0_column", "image_1_column", "label_column", "user_column")

_CAPTION: tuple[tuple[str, ...], Alternatives] = (("caption",), (("caption",), ("prompt",), ("original_prompt",), ("text",), ("txt",)))
_IMAGES: tuple[tuple[str, ...], Alternatives] = (("jpg_0", "jpg_1"), (("jpg_0", "jpg_1"), ("image_0", "image_1"), ("image1", "image2")))
_LIST = ("images",)
_OPTIONAL_OF_A_PAIR: tuple[tuple[tuple[str, ...], Alternatives], ...] = (
    (("image_0_uid", "image_1_uid"), (("image_0_uid", "image_1_uid"),)),
    (("ranking_id",), (("ranking_id",),)),
    (("model_0",), (("model_0",), ("model1",))),
    (("model_1",), (("model_1",), ("model2",))),
    (("margin",), (("margin",),)),
    (("caption_0", "caption_1"), (("caption_0", "caption_1"),)),
    (("caption_negative",), (("caption_negative",), ("caption_neg",), ("negative_caption",))),
)


@dataclass(frozen=True)
class Form:
    """Our names of the columns that make a row, in groups, with the accepted names of theirs for each group."""

    name: str
    meaning: str
    groups: tuple[tuple[tuple[str, ...], Alternatives], ...]
    flags: Mapping[str, str]  # setting that names a column -> our name of it
    optional: tuple[tuple[tuple[str, ...], Alternatives], ...] = _OPTIONAL_OF_A_PAIR

    @property
    def accepted(self) -> str:
        """The form for an error message: its columns with their alternatives."""
        groups = (" or ".join(", ".join(names) for names in alternatives) for _, alternatives in self.groups)
        return f"{self.name} ({'; '.join(groups)})"


_PAIR_FLAGS = {"caption_column": "caption", "image_0_column": "jpg_0", "image_1_column": "jpg_1", "user_column": "user_id"}
_ONE_IMAGE: tuple[tuple[str, ...], Alternatives] = (("jpg_0",), (("image",), ("jpg",), ("image_path",)))
_ONE_FLAGS = {"caption_column": "caption", "image_0_column": "jpg_0", "user_column": "user_id"}
_LIST_OPTIONAL: tuple[tuple[tuple[str, ...], Alternatives], ...] = (
    (("ranking_id",), (("ranking_id",), ("prompt_id",))),
    (("margin",), (("margin",),)),
)

_ALL = (
    Form(
        "pairs",
        "two images and the probability that the first is better",
        (_CAPTION, _IMAGES, (("label_0",), (("label_0",),))),
        _PAIR_FLAGS | {"label_column": "label_0"},
    ),
    Form(
        "chosen_rejected",
        "the better image and the worse one",
        (_CAPTION, (("jpg_0", "jpg_1"), (("chosen", "rejected"), ("img_better", "img_worse")))),
        _PAIR_FLAGS,
    ),
    Form(
        "votes",
        "two images and the votes, or weights of votes, for each",
        (
            _CAPTION,
            _IMAGES,
            (
                ("votes_0", "votes_1"),
                (
                    ("votes_0", "votes_1"),
                    ("votes_image1", "votes_image2"),
                    ("weighted_results_image1_preference", "weighted_results_image2_preference"),
                ),
            ),
        ),
        _PAIR_FLAGS,
    ),
    Form(
        "ranked",
        "a list of images and their ranks (1 is best), or one image per row with prompt_id and rank",
        (
            _CAPTION,
            (_LIST, (("images",), ("image",), ("image_path",), ("generations",), ("file_path",))),
            (("ranks",), (("rank",), ("ranking",), ("ranks",))),
        ),
        {"caption_column": "caption", "image_0_column": "images", "label_column": "ranks", "user_column": "user_id"},
        _LIST_OPTIONAL,
    ),
    Form(
        "hpd",
        "a list of two images and a list of two preferences, 1 for the better (HPDv2's train.json)",
        (_CAPTION, (_LIST, (("file_path",), ("image_path",), ("image",))), (("preference",), (("human_preference",),))),
        {"caption_column": "caption", "image_0_column": "images", "label_column": "preference", "user_column": "user_id"},
        _LIST_OPTIONAL,
    ),
    Form(
        "labelled",
        "one image and whether it is good (1, true) or bad (0, false)",
        (_CAPTION, _ONE_IMAGE, (("label_0",), (("label",), ("desirable",)))),
        _ONE_FLAGS | {"label_column": "label_0"},
        (),
    ),
    Form(
        "captions",
        "one image with the caption that it shows and one that it does not",
        (_CAPTION, _ONE_IMAGE, (("caption_negative",), (("caption_negative",), ("caption_neg",), ("negative_caption",)))),
        _ONE_FLAGS,
        (),
    ),
)
FORMS = {form.name: form for form in _ALL}
"""What a row can mean, by the name that `data_format` gives it."""

_BY_SCORE = ("pairs", "chosen_rejected")  # forms whose order a scorer may decide


@dataclass(frozen=True)
class Layout:
    """A form with the columns found for it."""

    form: str
    columns: Mapping[str, str]  # our name -> theirs
    scores: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # name -> columns of image 0 and image 1, perhaps numeric

    @property
    def needed(self) -> list[str]:
        """Every column of theirs that is read."""
        return list(dict.fromkeys([*self.columns.values(), *(name for pair in self.scores.values() for name in pair)]))

    def describe(self) -> str:
        """For the line that says what was found: the form, and the columns under other names than ours."""
        renamed = [f"{ours} from {theirs}" for ours, theirs in self.columns.items() if ours != theirs]
        return self.form + (f" ({', '.join(renamed)})" if renamed else "")


def choose(names: Sequence[str], where: str, data_format: str, given: Mapping[str, str], choice_model: str | None) -> Layout:
    """The one form that the column `names` fit, with its columns.

    `given` maps settings (COLUMN_FLAGS) to the columns they name. `data_format` is the name of a form, or anything else for all.

    Raises:
        ValueError: a named column does not exist, no form fits, or more than one does.
    """
    _check_given(names, where, given)
    candidates = [FORMS[data_format]] if data_format in FORMS else list(FORMS.values())
    if choice_model:
        candidates = [form for form in candidates if form.name in _BY_SCORE]
        if not candidates:
            raise ValueError(f"choice_model is {choice_model!r} with data_format {data_format!r}, accepted with: {', '.join(_BY_SCORE)}")
    found, missing = {}, {}
    for form in candidates:
        columns, missing[form.name] = _columns(form, names, given, bool(choice_model))
        if not missing[form.name] and not (data_format not in FORMS and _is_guess(form, columns, given)):
            found[form.name] = columns
    if data_format == "hpd" and not found and not _columns(FORMS["ranked"], names, given, False)[1]:
        return choose(names, where, "ranked", given, choice_model)  # HPDv2's test.json
    if len(found) > 1:
        raise ValueError(
            f"{where} fits more than one form: {', '.join(found)} (columns found: {', '.join(names)}). Name the one that is meant with "
            f"data_format, or the columns with {', '.join(COLUMN_FLAGS)}"
        )
    if not found:
        raise ValueError(_nothing_fits(names, where, candidates, missing, data_format))
    [(name, columns)] = found.items()
    return Layout(name, columns, score_columns(names, set(columns.values())))


def _check_given(names: Sequence[str], where: str, given: Mapping[str, str]) -> None:
    users: dict[str, str] = {}
    for flag, column in given.items():
        if column not in names:
            raise ValueError(
                f"{flag} is {column!r}, which is no column of {where}{nearest(column, names)}; found: {', '.join(names) or 'none'}"
            )
        if column in users:
            raise ValueError(f"{users[column]} and {flag} are both {column!r}; give each its own column")
        users[column] = flag


def _columns(form: Form, names: Sequence[str], given: Mapping[str, str], by_score: bool) -> tuple[dict[str, str], list[str]]:
    """({our name: theirs} of what was found, what is missing). A given column that the form cannot use counts as missing."""
    ours_given = {form.flags[flag]: column for flag, column in given.items() if flag in form.flags}
    missing = [f"no use for {flag}" for flag in given if flag not in form.flags]
    columns: dict[str, str] = {}
    for group, alternatives in form.groups:
        named = [tuple(ours_given.get(ours, theirs) for ours, theirs in zip(group, names_, strict=True)) for names_ in alternatives]
        fitting = [option for option in named if len(set(option)) == len(option) and all(name in names for name in option)]
        if fitting:
            columns |= zip(group, fitting[0], strict=True)
        elif not (by_score and group == ("label_0",)):
            missing += [repr(name) + nearest(name, names) for name in named[0] if name not in names] or [repr(named[0][-1])]
    for group, alternatives in form.optional:
        option = next((names_ for names_ in alternatives if all(name in names for name in names_)), None)
        if option is not None and not set(option) & set(columns.values()):
            columns |= zip(group, option, strict=True)
    user = ours_given.get("user_id", "user_id")
    if user in names:
        columns["user_id"] = user
    label = columns.get("label_0", "")
    other = label[:-1] + "1"
    if form.name == "pairs" and label.endswith("_0") and other in names:
        columns["label_1"] = other
    return columns, missing


def _is_guess(form: Form, columns: Mapping[str, str], given: Mapping[str, str]) -> bool:
    """Two images named by settings do not say that the first is the better one: that form has to be named."""
    return form.name == "chosen_rejected" and (columns["jpg_0"], columns["jpg_1"]) not in form.groups[1][1]


def _nothing_fits(names: Sequence[str], where: str, candidates: Sequence[Form], missing: Mapping[str, list[str]], data_format: str) -> str:
    best = min(candidates, key=lambda form: len(missing[form.name]))
    lacks = (
        f"for {best.name} it lacks {', '.join(missing[best.name])}" if missing[best.name] else f"{best.name} has to be named by data_format"
    )
    return (
        f"the columns of {where} fit no accepted form: {lacks}. Found: {', '.join(names) or 'none'}. Accepted with data_format "
        f"{data_format!r}: {'; '.join(form.accepted for form in candidates)}. Name other columns with {', '.join(COLUMN_FLAGS)}"
    )


def nearest(name: str, candidates: Iterable[str]) -> str:
    """' (nearest: ...)' with the names that are spelt alike, or nothing."""
    near = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(near)})" if near else ""


_NO_SCORE = {"label", "jpg", "image", "model", "png", "webp"}


def score_columns(names: Sequence[str], taken: set[str]) -> dict[str, tuple[str, str]]:
    """{name: (column of image 0, column of image 1)} of the columns `<name>_0` and `<name>_1` that may hold scores."""
    found = {}
    for name in names:
        base, other = name[:-2], f"{name[:-2]}_1"
        is_known = base in _NO_SCORE or set(base.split("_")) & {"label", "uid", "url"} or {name, other} & taken
        if name.endswith("_0") and other in names and not is_known:
            found[base] = (name, other)
    return found


def score_names(scorer: str) -> list[str]:
    """Under which names the scores of a scorer are looked for; ps_score is SmPO's name for PickScore."""
    return [scorer, f"{scorer}_score", *(["ps_score"] if scorer == "pickscore" else [])]


def score_of(choice_model: str, available: Mapping[str, object], names: Sequence[str]) -> str:
    """The name in `available` of the scores that `choice_model` asks for.

    Raises:
        ValueError: there are none; the message says how to add them.
    """
    accepted = score_names(choice_model)
    for name in accepted:
        if name in available:
            return name
    columns = " or ".join(f"{name}_0, {name}_1" for name in accepted)
    raise ValueError(
        f"choice_model is {choice_model!r}, which needs numbers in the columns {columns}; found: {', '.join(names)}. "
        f"Score both images of every row with that scorer and add the two columns"
    )
