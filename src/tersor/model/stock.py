def born(*a):
    raise NotImplementedError
