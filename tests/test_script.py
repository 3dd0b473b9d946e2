"""What a user sees of a traceback."""

import traceback

import pytest

import hvdtrain
from hvdtrain import script


def ours(source):
    """Make a function of hvdtrain's."""
    made = {}
    exec(compile(source, hvdtrain.__file__.replace("__init__", "made_up"), "exec"), made)
    return made["ours"]


def shown(function):
    with pytest.raises(ZeroDivisionError) as caught:
        function()
    return [frame.name for frame in traceback.extract_tb(script.users_part(caught.value))]


def users_callback():
    return 1 / 0


def test_frames_of_ours_between_those_of_the_user_are_left_out():
    calls = ours("def ours(function): return function()")
    assert shown(lambda: calls(users_callback)) == ["shown", "<lambda>", "users_callback"]
    assert shown(lambda: calls(lambda: calls(users_callback)))[-2:] == ["<lambda>", "users_callback"]


def test_frames_of_ours_stay_where_the_error_is_ours():
    raises = ours("import json\ndef ours(text): json.loads(text, parse_int=lambda found: 1 / 0)")
    assert shown(lambda: raises("1"))[:3] == ["shown", "<lambda>", "ours"]


def test_what_leads_to_the_script_is_left_out():
    begins = ours("def ours(function): return function()")
    with pytest.raises(ZeroDivisionError) as caught:
        begins(users_callback)
    caught.value.__traceback__ = caught.value.__traceback__.tb_next  # without the frame of this test
    assert [frame.name for frame in traceback.extract_tb(script.users_part(caught.value))] == [
        "users_callback"
    ]
