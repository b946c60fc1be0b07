"""What the libraries print for nobody is left out, and nothing else."""

import logging

import mmengine.logging

from mmgfp.apps.upstream_noise import without_onedl_notice


def test_only_the_notice_of_onedl_is_left_out(capsys):
    before = mmengine.logging.print_log
    with without_onedl_notice():
        from mmengine.logging import print_log

        print_log('Could not import OneDL. Skipping.', level=logging.DEBUG)
        print_log('Could not import something else.', level=logging.DEBUG)
    assert capsys.readouterr().out.strip() == 'Could not import something else.'
    assert mmengine.logging.print_log is before
