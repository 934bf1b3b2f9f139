package e2e

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
)

// startAborting runs a server that begins an answer, with one empty message if the method streams, and resets the
// stream. It is net/http's, since grpc-go's cannot be made to.
func startAborting(t *testing.T) string {
	t.Helper()
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	l, addr := listen(t)
	srv := &http.Server{
		Protocols: &protocols,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("X-Aborting", "yes")
			w.Header()["Date"] = nil
			if strings.HasSuffix(r.URL.Path, "OutputCall") || strings.HasSuffix(r.URL.Path, "DuplexCall") {
				raw, err := proto.Marshal(kinds[2].responses("")[0])
				if err != nil {
					panic(err)
				}
				_, _ = w.Write(append([]byte{0, 0, 0, 0, byte(len(raw))}, raw...))
			}
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		_ = srv.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return addr
}
