package e2e

// fieldTransport are faults of dials, queues and certificates.
var fieldTransport = []fieldCase{}
