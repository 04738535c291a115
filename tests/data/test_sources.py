"""Mixtures as a recipe states them: sources located, indexed, with their own weights and policies."""

import pytest
from test_shards import good, write_shard

from tokenflex.config import load_config
from tokenflex.data.index import index_folder
from tokenflex.data.sources import build_indexes, locate_sources, mix, open_indexes
from tokenflex.errors import UserError


@pytest.fixture
def recipe(tmp_path):
    for name, number in (("a", 6), ("b", 4)):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "0.tar", [good(f"{name}{i}") for i in range(number)])
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"data:\n  cache_dir: {tmp_path}/cache\n  sources:\n"
        f"    - {{paths: {tmp_path}/a, weight: 0.75}}\n"
        f"    - {{paths: ['{tmp_path}/b/*.tar'], weight: 0.25, epochs: 2, over_long: drop}}\n"
    )
    return path


def test_a_recipe_mixes_sources(recipe, processor):
    data = load_config(recipe).data
    located = locate_sources(data)
    folders = build_indexes(located, processor, data)
    mixture = mix(located, open_indexes(located, folders, processor))
    assert len(mixture) == 10 and mixture.per_epoch == [6, 2]
    assert [source.over_long for source in mixture.sources] == ["error", "drop"]
    assert mixture.shard_of(7).path.parent.name == "b" and mixture.locate(7)[1] == 1


def test_parts_of_a_folder_have_indexes_of_their_own(tmp_path, processor):
    shards = [write_shard(tmp_path / f"{n}.tar", [good(str(n))]) for n in range(2)]
    config = load_config(None, [f"data.cache_dir={tmp_path}/cache", f"data.train=[{shards[0]}]"])
    part = index_folder(locate_sources(config.data)[0].shards, config.data.cache_dir, "f")
    config = load_config(None, [f"data.cache_dir={tmp_path}/cache", f"data.train=[{tmp_path}]"])
    whole = index_folder(locate_sources(config.data)[0].shards, config.data.cache_dir, "f")
    assert whole == tmp_path / "index" and part.parent == tmp_path / "cache" / "indexes"


@pytest.mark.parametrize(
    "line, part",
    [("wieght: 1", "data.sources.0.wieght; did you mean"), ("over_long: cut", "data.sources.0.over_long")],
)
def test_a_wrong_key_of_a_source_is_named(line, part, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {{sources: [{{paths: /a, {line}}}]}}\n")
    with pytest.raises(UserError, match=part):
        load_config(path)


def test_a_source_without_shards_is_named_by_its_place(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {{sources: [{{paths: {tmp_path}/none}}]}}\n")
    with pytest.raises(UserError, match=r"data.sources\[0\]: no shard at"):
        locate_sources(load_config(path).data)
