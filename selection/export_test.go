package selection

// SetChild lets tests of other packages' kind put any policy within one of ours.
func (n *nested) SetChild(p Policy) { n.child = p }
