package grpcproxy

import (
	"sync"

	"go.uber.org/zap"
)

var hint, relayHint sync.Once

// hintAtRelay tells, once in the life of the process, that calls could cost less.
func hintAtRelay(logger *zap.Logger) {
	relayHint.Do(func() {
		logger.Info("calls go through Caddy's HTTP server; with the listener wrapper grpc_relay in the server's options those that need nothing of it go past it, at a fraction of the cost",
			zap.String("option", "servers { listener_wrappers { grpc_relay } }"))
	})
}

// hintAtMetadataKeys tells, once in the life of the process, what Caddy does to metadata keys that gRPC allows.
func hintAtMetadataKeys(logger *zap.Logger) {
	hint.Do(func() {
		logger.Info("Caddy drops request metadata whose key contains '_' or '.'; if your clients send such keys, allow them in the server's options",
			zap.Strings("options", []string{"expected_underscore_headers", "expected_dot_headers"}))
	})
}
