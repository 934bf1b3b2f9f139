package e2e

// fieldHealth are faults of health checks and ejections.
var fieldHealth = []fieldCase{}
