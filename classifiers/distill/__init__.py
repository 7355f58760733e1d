"""Makes a draft for a target out of the target's own text: `disco-serve distill-draft`."""
