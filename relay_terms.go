package grpcproxy

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"hash"
	"maps"
	"os"
	"slices"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// termsOf sums up what clients of a server have agreed to by connecting: how they have shown who they are, and the limits that they were
// told of. Connections do not outlast a reload that changes it, or a client certificate that was good yesterday would be good for ever.
// Files that client certificates are checked against count by what is in them, the server's own certificates not at all.
func termsOf(srv *caddyhttp.Server) (string, error) {
	sum := sha256.New()
	err := json.NewEncoder(sum).Encode([]any{
		srv.TLSConnPolicies, srv.StrictSNIHost, srv.MaxHeaderBytes, srv.ReadHeaderTimeout, srv.ReadTimeout, srv.WriteTimeout, srv.IdleTimeout,
	})
	if err != nil {
		return "", err
	}
	for _, p := range srv.TLSConnPolicies {
		raw, err := json.Marshal(p.ClientAuthentication)
		if err != nil {
			return "", err
		}
		var auth any
		if err := json.Unmarshal(raw, &auth); err != nil {
			return "", err
		}
		addFiles(sum, auth)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// addFiles adds the files that a part of a configuration names: whatever is the path of one.
func addFiles(sum hash.Hash, config any) {
	switch v := config.(type) {
	case string:
		if content, err := os.ReadFile(v); err == nil { //nolint:gosec // the operator names it
			one := sha256.Sum256(content)
			_, _ = sum.Write(one[:])
		}
	case []any:
		for _, x := range v {
			addFiles(sum, x)
		}
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			addFiles(sum, v[name])
		}
	}
}
