package e2e

// fieldCaddy are faults of the rest of Caddy around the handler.
var fieldCaddy = []fieldCase{}
