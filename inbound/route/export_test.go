package route

// Size is how many decisions are remembered.
func (t *Table) Size() int { return len(t.decisions) }
