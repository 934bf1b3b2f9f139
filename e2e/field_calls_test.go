package e2e

// fieldCalls are faults of requests, answers and statuses.
var fieldCalls = []fieldCase{}
