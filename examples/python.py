"""The same in Python: run it in this folder, python python.py."""

from mine import net, task

import tersor

model, data = net(), task()
prune = tersor.Prune(keep=0.3, epochs=30, ramp=0.5, lr=0.01)
small = tersor.run(model, [prune, tersor.Cluster(entries=16, epochs=5), tersor.Entropy()], data)
print(tersor.save(small, "out/small.tersor"), "bytes")
print(f"{data.scores(model).mean():.4f} -> {data.scores(small.model()).mean():.4f}")
print("ledger", small.ledger.digest)
again = tersor.load("out/small.tersor").model(net())  # a plain nn.Module with the compressed weights
