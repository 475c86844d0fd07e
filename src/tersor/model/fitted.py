from tersor.model.dress import NONE, dress


def fitted(model, forms, sites, aliases=NONE, changes=()):
    return dress(model, forms, sites, aliases)
