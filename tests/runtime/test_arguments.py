"""What the flags of generate, score and evaluate say to wrong input."""

import pytest

from lmmr1_jax.commands.common import add_sampling_flags, parser
from lmmr1_jax.config.renamed import FLAGS
from lmmr1_jax.runtime.errors import UserError


@pytest.mark.parametrize("old", FLAGS)
def test_a_renamed_flag_is_answered_by_its_name_now_before_any_flag_is_missed(old):
    flags = parser("generate", "")
    add_sampling_flags(flags, temperature=1.0)
    assert FLAGS[old] in flags.format_help()
    for words in ([old, "1"], [f"{old}=1"]):
        with pytest.raises(UserError, match=f"^{old} is now {FLAGS[old]}$"):
            flags.parse_args(words)
