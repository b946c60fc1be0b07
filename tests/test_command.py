"""The command `mmgfp` finds the tools and hands everything on to them."""

import subprocess
import sys

import pytest
from support.tooling import ROOT

import mmgfp_command


def run(*args):
    code = 'import sys, mmgfp_command as c; code = c.main(); '
    code += 'print("torch" in sys.modules); sys.exit(code)'
    return subprocess.run(
        [sys.executable, '-c', code, *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(('args', 'status'), [(['--help'], 0), (['-h'], 0), ([], 2)])
def test_help_lists_the_commands_and_is_light(args, status):
    done = run(*args)
    assert done.returncode == status and done.stdout.endswith('False\n')
    lines = [
        line.split(None, 1) for line in done.stdout.splitlines() if line[:1] == ' '
    ]
    assert [name for name, _ in lines] == list(mmgfp_command.commands())
    said = dict(lines)
    assert said['test'] == "Test a model: OpenMMLab's test tool for mmgfp."
    assert {'analyze', 'prune', 'train', 'deploy', 'profile'} <= said.keys()


def test_every_command_says_what_it_does_in_a_line():
    for name, tool in mmgfp_command.commands().items():
        assert mmgfp_command.summary(tool).endswith(('.', ':')), name


def test_version():
    import mmgfp

    assert run('--version').stdout.splitlines() == [mmgfp.__version__, 'False']


def test_an_unknown_command_is_named_in_one_line():
    done = run('pruen')
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith('error: the command must be one of analyze, prune')
    assert '(got pruen)' in line


def test_arguments_go_in_and_the_status_comes_out(tmp_path, monkeypatch, capsys):
    tools = tmp_path / 'mmgfp/.mim/tools'  # as in a wheel
    tools.mkdir(parents=True)
    (tools / 'prune.py').write_text(
        '"""Take notes.\n\nMore."""\nimport sys\n'
        'if __name__ == "__main__":\n    print(sys.argv)\n    sys.exit(7)\n'
    )
    monkeypatch.setattr(mmgfp_command, 'package_folder', lambda: tmp_path / 'mmgfp')
    monkeypatch.setattr(sys, 'argv', ['mmgfp'])
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])
    assert list(mmgfp_command.commands()) == ['prune']
    with pytest.raises(SystemExit) as stop:
        mmgfp_command.main(['prune', 'a.py', '--help'])
    assert stop.value.code == 7
    assert capsys.readouterr().out == "['mmgfp prune', 'a.py', '--help']\n"


def test_a_tool_s_help_names_the_command():
    done = run('analyze', '--help')
    assert done.returncode == 0 and done.stdout.startswith('usage: mmgfp analyze ')


def test_the_tools_lie_where_the_command_looks():
    folders = {path.parent for path in mmgfp_command.commands().values()}
    assert folders == {ROOT / 'tools'}
