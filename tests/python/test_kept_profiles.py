# SPDX-License-Identifier: Apache-2.0
"""``enable(model, head_profile=True)``: a profile that is made once and kept in a folder."""

import os
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from llamas import tiny_llama

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("profiles need transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import HeadProfile, enable, profile_heads
from fixed_size_kv_cache.huggingface import kept_profiles
from fixed_size_kv_cache.huggingface.kept_profiles import fingerprint, folder, kept_profile


@pytest.fixture(autouse=True)
def made(monkeypatch, tmp_path):
    """Profiles are kept in a folder of the test, and counted."""
    monkeypatch.setenv("FSDC_PROFILES", str(tmp_path / "kept"))
    models = []

    def count(model, **options):
        models.append(model)
        return profile_heads(model, torch.arange(80) % 100, kept=16, **options)

    monkeypatch.setattr(kept_profiles, "profile_heads", count)
    return models


def kept() -> list[Path]:
    return sorted(folder().iterdir())


def test_a_profile_is_made_once(made):
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle, again = (enable(model, cache_size=40, head_profile=True) for _ in range(2))
        other = enable(tiny_llama(), cache_size=40, head_profile=True)  # the same weights
    assert made == [model]
    (path,) = kept()
    named = enable(model, cache_size=40, head_profile=path)
    assert handle.settings == again.settings == other.settings == named.settings
    sizes = [size for layer in handle.settings.cache_size for size in layer]
    assert sum(sizes) == 40 * len(sizes) and len(set(sizes)) > 3
    equal = enable(model, cache_size=40, head_profile=False)
    assert equal.settings.cache_size == 40


def test_random_ids_are_read_with_a_bar(monkeypatch, made):
    """What the tests replace: all of it, as users get it."""
    seen = []
    monkeypatch.setattr(kept_profiles.logging, "tqdm", lambda steps, **options: seen.append(options) or steps)
    monkeypatch.setattr(kept_profiles, "profile_heads", profile_heads)
    model = tiny_llama(torch.float32)
    model.config.max_position_embeddings = 200  # so that it is quick
    assert kept_profile(model) == profile_heads(model)
    assert seen == [{"desc": "profiling KV heads"}]


def test_other_weights_have_another_fingerprint():
    model = tiny_llama()
    first = fingerprint(model)
    assert first == fingerprint(tiny_llama()) and len(first) == 16
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] += 1e-9
    changed = fingerprint(model)
    assert len({first, changed, fingerprint(tiny_llama(torch.float32)), fingerprint(tiny_llama().half())}) == 4
    assert fingerprint(tiny_llama(torch.bfloat16))  # a type that numpy does not know
    model.model.layers[1].self_attn.register_parameter("more", torch.nn.Parameter(torch.empty(0)))
    assert fingerprint(model) != changed


def test_samples_are_few_and_reach_the_end(monkeypatch):
    """A change of any stretch of a weight that is longer than the distance of samples shows."""
    model = tiny_llama()
    first, weight = fingerprint(model), model.lm_head.weight
    distance = -(-weight.numel() // kept_profiles.SAMPLES)
    for start in (0, 1234, weight.numel() - distance):
        before = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[start : start + distance] += 1
        assert fingerprint(model) != first
        with torch.no_grad():
            weight.copy_(before)
    assert fingerprint(model) == first


@pytest.mark.parametrize("text", ["", "{", '{"format": 0}', '{"format": 1, "model": "x"}'])
def test_a_damaged_file_is_made_anew(text, made):
    model = tiny_llama()
    profile = kept_profile(model)
    (path,) = kept()
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"enable: the profile kept as .*\.json is made anew: HeadProfile: "):
        assert kept_profile(model) == profile
    assert len(made) == 2 and HeadProfile.load(path) == profile and kept() == [path]


def test_a_file_of_another_model_is_made_anew(made):
    model = tiny_llama()
    profile = kept_profile(model)
    (path,) = kept()
    HeadProfile("other", 1, "0" * 16, profile.output_error).save(path)
    with pytest.warns(UserWarning, match="is made anew: head_profile must be of the same model.* got that of other"):
        assert kept_profile(model) == profile
    assert HeadProfile.load(path) == profile


def test_what_cannot_be_kept_is_a_warning(made, tmp_path):
    (tmp_path / "kept").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="the profile cannot be kept, so the next process .*; FSDC_PROFILES") as said:
        handle = enable(tiny_llama(), cache_size=40, head_profile=True)
    assert len(said) == 1
    assert len(made) == 1 and handle.settings.average_size == 40


def test_a_write_that_breaks_off_leaves_nothing(made, monkeypatch):
    def break_off(self, path):
        Path(path).write_text('{"format": 1')
        raise OSError("no space left on device")

    monkeypatch.setattr(HeadProfile, "save", break_off)
    with pytest.warns(UserWarning, match="cannot be kept.* no space left on device"):
        kept_profile(tiny_llama())
    assert kept() == []


def test_where_profiles_are_kept(monkeypatch):
    monkeypatch.setenv("FSDC_PROFILES", "~/here")
    assert folder() == Path.home() / "here"
    monkeypatch.delenv("FSDC_PROFILES")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert folder() == Path("/caches/fixed_size_kv_cache/profiles")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == Path(os.path.expanduser("~/.cache/fixed_size_kv_cache/profiles"))


def test_weights_that_are_elsewhere_are_refused(made, monkeypatch):
    with pytest.raises(NotImplementedError, match=r"head_profile=True must find all weights .* as a meta tensor; make"):
        fingerprint(tiny_llama().to("meta"))
    monkeypatch.setattr(kept_profiles, "processes_meet_in", lambda model: True)
    with pytest.raises(NotImplementedError, match=r"got model\.embed_tokens\.weight as Parameter"):
        enable(tiny_llama(), cache_size=40, head_profile=True)
    assert made == []
