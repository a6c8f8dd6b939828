"""How each paper's golden cases are computed by our code: one module a slug.

A module `<slug>.py` has

    def adapter(variant, overrides, inputs, state_dict) -> {output name: array}

which sees the model id, the config fields that differ from it, the inputs by name and the published parameters, and
nothing else: cases at other sizes and inputs run through it unseen. It may compute more outputs than a case holds.

Where a slug's cases are records (`.json`), its module also has

    def records(case) -> {key: value}

which computes again, from the other entries of the record, the entries that are results.
"""
