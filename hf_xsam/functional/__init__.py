"""The paper's formulas as pure functions of lists of tensors; nothing here knows a trainer."""
