package grpcproxy

import (
	"sync"

	"go.uber.org/zap"
)

var hint sync.Once

// hintAtMetadataKeys tells, once in the life of the process, what Caddy does to metadata keys that gRPC allows.
func hintAtMetadataKeys(logger *zap.Logger) {
	hint.Do(func() {
		logger.Info("Caddy drops request metadata whose key contains '_' or '.'; if your clients send such keys, allow them in the server's options",
			zap.Strings("options", []string{"expected_underscore_headers", "expected_dot_headers"}))
	})
}
