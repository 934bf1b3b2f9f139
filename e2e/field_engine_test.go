package e2e

// fieldEngine are faults of frames, windows and connections.
var fieldEngine = []fieldCase{}
