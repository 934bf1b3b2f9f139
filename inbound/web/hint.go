package web

import (
	"strings"
	"sync"

	"go.uber.org/zap"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

var trailerHint = new(sync.Once)

// lostInTrailers are the names that Go's HTTP servers do not send as trailers (golang.org/x/net/http/httpguts), besides
// those of one connection, which no proxy passes on.
var lostInTrailers = map[string]bool{
	"authorization": true, "cache-control": true, "content-encoding": true, "content-length": true, "content-range": true,
	"content-type": true, "expect": true, "host": true, "max-forwards": true, "pragma": true, "proxy-authenticate": true,
	"proxy-authorization": true, "range": true, "realm": true, "www-authenticate": true,
}

// hintAtTrailers tells, once in the life of the process, that an upstream uses a name in trailers that Go's HTTP servers
// do not send there.
func hintAtTrailers(logger *zap.Logger, fields []h2.Field) {
	for _, f := range fields {
		if !lostInTrailers[f.Name] && !strings.HasPrefix(f.Name, "if-") {
			continue
		}
		trailerHint.Do(func() {
			logger.Warn("Caddy's HTTP server does not send trailers of some names, such as this one; in the response's leading metadata it would pass",
				zap.String("name", f.Name))
		})
	}
}
