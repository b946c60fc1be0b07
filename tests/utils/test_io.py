"""Files are whole or absent, and loading runs no code."""

import os
import stat
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from mmgfp.utils import io
from mmgfp.utils.errors import SavingError, StructureError
from mmgfp.utils.io import atomic_write, load_weights_only, save_checkpoint


class Foreign:
    """A class that a weights-only load may not name."""

    def __init__(self):
        self.values = [1, 2]


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


# -- writing --


def test_write_creates_the_folder_and_leaves_one_readable_file(tmp_path):
    path = tmp_path / 'a' / 'b' / 'file.txt'
    atomic_write(path, lambda tmp: tmp.write_text('whole'))
    assert path.read_text() == 'whole'
    assert listing(path.parent) == ['file.txt']
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize('kind', [OSError, RuntimeError])  # torch.save's is the latter
def test_failing_writer_leaves_the_old_file_whole(kind, tmp_path):
    path = tmp_path / 'file.txt'
    path.write_text('old')

    def fail(tmp):
        tmp.write_text('half')
        raise kind('disk full\nand more')

    words = r'file.txt must be written whole \(got disk full\); what was there'
    with pytest.raises(SavingError, match=words):
        atomic_write(path, fail)
    assert path.read_text() == 'old'
    assert listing(tmp_path) == ['file.txt']


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / 'file.txt'
    path.write_text('old')
    seen = []

    def write(tmp):
        tmp.write_text('ne')
        seen.append((path.read_text(), tmp.parent))
        tmp.write_text('new')

    atomic_write(path, write)
    assert seen == [('old', tmp_path)]  # beside it, so that replacing is atomic
    assert path.read_text() == 'new'


def test_a_checkpoint_that_cannot_be_saved_leaves_the_old_one(tmp_path):
    path = tmp_path / 'model.pth'
    save_checkpoint({'epoch': 1}, path)
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        save_checkpoint({'epoch': 2, 'socket': (i for i in range(3))}, path)
    assert load_weights_only(path) == {'epoch': 1}
    assert listing(tmp_path) == ['model.pth']


# -- reading --


def test_weights_round_trip(tmp_path):
    path = tmp_path / 'model.pth'
    tensors = {
        'weight': torch.randn(2, 3),
        'half': torch.ones(2, dtype=torch.bfloat16),
        'count': torch.tensor(3),
    }
    save_checkpoint({'state_dict': tensors, 'meta': {'epoch': 3}}, path)
    loaded = load_weights_only(path)
    assert loaded['meta'] == {'epoch': 3}
    for name, tensor in tensors.items():
        assert loaded['state_dict'][name].dtype == tensor.dtype
        assert torch.equal(loaded['state_dict'][name], tensor)


def test_foreign_objects_become_empty_stand_ins(tmp_path):
    path = tmp_path / 'train.pth'
    weight = torch.nn.Parameter(torch.randn(3))
    checkpoint = {
        'message_hub': {'log': Foreign(), 'loss': np.float64(0.5)},
        'state_dict': {'weight': weight, 'sum': weight.detach() + 1},
        'epoch': 7,
    }
    torch.save(checkpoint, path)
    with pytest.raises(Exception, match='weights_only'):
        torch.load(path, weights_only=True)
    loaded = load_weights_only(path)
    assert loaded['epoch'] == 7
    assert torch.equal(loaded['state_dict']['weight'], weight)
    assert torch.equal(loaded['state_dict']['sum'], weight + 1)
    assert not isinstance(loaded['message_hub']['log'], Foreign)
    assert not loaded['message_hub']['log']


def test_history_buffers_of_mmengine_do_not_stand_in_the_way(tmp_path):
    from mmengine.logging import MessageHub

    path = tmp_path / 'train.pth'
    hub = MessageHub('test_io')
    hub.update_scalar('train/loss', 0.5)
    torch.save({'message_hub': hub.state_dict(), 'weight': torch.ones(2)}, path)
    assert torch.equal(load_weights_only(path)['weight'], torch.ones(2))


def test_loading_runs_no_code(tmp_path):
    path, made = tmp_path / 'evil.pth', tmp_path / 'made'
    torch.save({'attack': Attack(made), 'weight': torch.ones(2)}, path)
    torch.load(path, weights_only=False)
    assert made.exists()  # the attack is real
    made.rmdir()
    assert torch.equal(load_weights_only(path)['weight'], torch.ones(2))
    assert not made.exists()


def pickled(*opcodes):
    """A pickle of the given opcodes, in protocol 2."""
    return b'\x80\x02' + b''.join(opcodes) + b'.'


def named(module, name):
    return f'c{module}\n{name}\n'.encode()


def text(value):
    return b'X' + len(value).to_bytes(4, 'little') + value.encode()


#: {'x': text} as a state, and (None, {'x': text}) as one of slots.
STATE = b'}' + text('x') + text('set') + b's'
SLOTS = b'N' + STATE + b'\x86'


@pytest.mark.parametrize(
    'target',
    [
        named('torch', 'UntypedStorage'),
        named('torch', 'FloatStorage'),
        named('torch', 'Size'),
        named('torch', 'device'),
        named('torch._utils', '_rebuild_tensor_v2'),
        named('collections', 'OrderedDict'),
        named('mmgfp.utils.io', '_StandIn'),
        named('builtins', 'dict'),
        named('torch', 'device') + text('cpu') + b'\x85R',
        named('torch', 'Size') + b')\x85R',
        b']',
    ],
)
@pytest.mark.parametrize('state', [STATE, SLOTS])
def test_a_file_changes_no_class_and_no_function(target, state, tmp_path):
    path = tmp_path / 'crafted.pth'
    crafted = pickled(b'}', text('a'), target, state, b'b', b's')
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('crafted/data.pkl', crafted)
        file.writestr('crafted/version', b'3\n')
        file.writestr('crafted/byteorder', b'little')
    holders = (torch.UntypedStorage, torch.FloatStorage, torch.Size, torch.device)
    holders += (torch._utils._rebuild_tensor_v2, OrderedDict, io._StandIn, dict)
    with pytest.raises(StructureError, match=r'crafted\.pth must be a checkpoint'):
        load_weights_only(path)
    assert not [h for h in holders if 'x' in vars_of(h)]


def vars_of(holder):
    return getattr(holder, '__dict__', {})


def test_an_ordered_dict_gets_its_metadata_and_nothing_else(tmp_path):
    path = tmp_path / 'crafted.pth'
    weights = torch.nn.BatchNorm1d(2).state_dict()
    weights.other = 'an attribute'
    torch.save({'state_dict': weights, 'hub': Foreign()}, path)
    loaded = load_weights_only(path)['state_dict']
    assert loaded._metadata == weights._metadata
    assert loaded.keys() == weights.keys() and not hasattr(loaded, 'other')


@pytest.mark.parametrize('new', [True, False])
def test_both_formats_of_torch_are_read(new, tmp_path):
    path = tmp_path / 'train.pth'
    weights = {'one': torch.randn(3), 'two': torch.nn.Parameter(torch.randn(2, 2))}
    data = {'hub': Foreign(), 'state_dict': OrderedDict(weights)}
    torch.save(data, path, _use_new_zipfile_serialization=new)
    loaded = load_weights_only(path)['state_dict']
    assert all(torch.equal(tensor, weights[n]) for n, tensor in loaded.items())


@pytest.mark.parametrize('kind', ['a file', 'below a file', 'not writable'])
def test_a_folder_that_cannot_be_written_to_gets_one_line(kind, tmp_path, monkeypatch):
    file = tmp_path / 'file'
    file.touch()
    folder = {'a file': file, 'below a file': file / 'a/b'}.get(kind, tmp_path)
    if kind == 'not writable':  # not by its mode, which binds no administrator

        def refuse(*args, **kwargs):
            raise PermissionError(13, 'Permission denied')

        monkeypatch.setattr(io.tempfile, 'TemporaryFile', refuse)
    with pytest.raises(SavingError, match=f'{folder} must be a folder to write to'):
        atomic_write(folder / 'x.txt', lambda tmp: tmp.write_text('x'))


def test_missing_file(tmp_path):
    words = r'none\.pth must be a checkpoint that loads with weights_only=True'
    with pytest.raises(StructureError, match=words):
        load_weights_only(tmp_path / 'none.pth')


@pytest.mark.parametrize('keep', [0, 10, 0.5, 0.95])
def test_truncated_file(keep, tmp_path):
    path = tmp_path / 'cut.pth'
    save_checkpoint({'weight': torch.randn(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(StructureError, match=r'cut\.pth must be.*if it is cut short'):
        load_weights_only(path)


def test_a_file_that_holds_no_dict(tmp_path):
    path = tmp_path / 'tensor.pth'
    torch.save(torch.ones(2), path)
    with pytest.raises(StructureError, match=r'must hold a dict \(got Tensor\); give'):
        load_weights_only(path)


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / 'notes.pth'
    path.write_text('these are notes')
    with pytest.raises(StructureError, match=r'notes\.pth must be a checkpoint'):
        load_weights_only(path)
