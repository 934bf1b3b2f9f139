package grpcwire

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// serveGRPC runs one call through grpc-go's server and returns its answer.
func serveGRPC(t *testing.T, header map[string]string, h grpc.StreamHandler) *http.Response {
	t.Helper()
	s := grpc.NewServer(grpc.UnknownServiceHandler(h))
	defer s.Stop()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/s/m", http.NoBody)
	r.Proto, r.ProtoMajor, r.ProtoMinor = "HTTP/2.0", 2, 0
	r.Header.Set("Content-Type", "application/grpc")
	for k, v := range header {
		r.Header.Set(k, v)
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w.Result()
}

// What grpc-go's server reads from grpc-timeout, we read too, and the other way round.
func TestTimeoutAgreesWithServer(t *testing.T) {
	for _, tt := range timeouts {
		if tt.in == "" { // No field, to grpc-go.
			continue
		}
		start := time.Now()
		var left time.Duration
		called := false
		resp := serveGRPC(t, map[string]string{"Grpc-Timeout": tt.in}, func(_ any, stream grpc.ServerStream) error {
			called = true
			if d, ok := stream.Context().Deadline(); ok {
				left = d.Sub(start)
			}
			return nil
		})
		if tt.want < 0 {
			if called || resp.StatusCode != http.StatusBadRequest {
				t.Errorf("%q: grpc-go answers %v, handler called: %v", tt.in, resp.Status, called)
			}
			continue
		}
		// A call without time left may be over before the handler begins.
		if tt.want < 2*time.Second || tt.want > 200*365*24*time.Hour {
			continue
		}
		if !called || left < tt.want || left > tt.want+timeout {
			t.Errorf("%q: grpc-go has %v left of %v", tt.in, left, tt.want)
		}
	}
}

const timeout = 5 * time.Second

// What grpc-go's server writes as grpc-message is what we write, byte for byte.
func TestMessageAgreesWithServer(t *testing.T) {
	messages := []string{"a\xffb", "\xe6\x97", "\xed\xa0\x80", "100% Größe\n\t\x00\x7f 😀"}
	for in, out := range encodedMessages {
		messages = append(messages, in, out)
	}
	for _, m := range messages {
		if m == "" {
			continue
		}
		resp := serveGRPC(t, nil, func(any, grpc.ServerStream) error { return status.Error(codes.DataLoss, m) })
		if got, want := resp.Trailer.Get("Grpc-Message"), EncodeMessage(m); got != want {
			t.Errorf("%q: grpc-go writes %q, we %q", m, got, want)
		}
		if got, ok := ParseStatus(resp.Trailer.Get("Grpc-Status")); !ok || got != DataLoss {
			t.Errorf("grpc-go's status is %q", resp.Trailer.Get("Grpc-Status"))
		}
	}
}

// Binary metadata: what grpc-go's server decodes we decode to the same, and what it refuses we refuse; what it
// encodes is what we encode.
func TestBinAgreesWithServer(t *testing.T) {
	for _, tt := range binValues {
		if tt.in == "====" || strings.ContainsRune(tt.in, ',') || strings.HasPrefix(tt.in, " ") || tt.in == "" {
			// Refused by both, but net/http and grpc-go's server split or trim such values before.
			continue
		}
		var got []string
		called := false
		resp := serveGRPC(t, map[string]string{"X-Bin": tt.in}, func(_ any, stream grpc.ServerStream) error {
			called = true
			md, _ := metadata.FromIncomingContext(stream.Context())
			got = md.Get("x-bin")
			stream.SetTrailer(metadata.Pairs("x-bin", string(tt.want)))
			return nil
		})
		if called != (tt.want != nil) {
			t.Errorf("%q: grpc-go takes it: %v, we: %v", tt.in, called, tt.want != nil)
			continue
		}
		if tt.want == nil {
			continue
		}
		if len(got) != 1 || got[0] != string(tt.want) {
			t.Errorf("%q: grpc-go reads %q, we %q", tt.in, got, tt.want)
		}
		if got, want := resp.Trailer.Get("X-Bin"), EncodeBin(tt.want); got != want {
			t.Errorf("%x: grpc-go writes %q, we %q", tt.want, got, want)
		}
	}
}

// What a grpc-go client makes of an answer, by HTTP status, content-type, grpc-status and grpc-message, is what our
// functions say.
func TestAnswersAgreeWithClient(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, k := range []string{"Grpc-Status", "Grpc-Message", "Content-Type"} {
			if v, ok := r.Header["X-"+k]; ok {
				w.Header()[k] = v
			}
		}
		code := http.StatusOK
		if v, err := strconv.Atoi(r.Header.Get("X-Http")); err == nil {
			code = v
		}
		w.WriteHeader(code)
	}))
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	defer server.Close()
	conn, err := grpc.NewClient("passthrough:///"+server.Listener.Addr().String(),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	call := func(pairs ...string) *status.Status {
		t.Helper()
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), pairs...), timeout)
		defer cancel()
		return status.Convert(conn.Invoke(ctx, "/s/m", new(emptypb.Empty), new(emptypb.Empty)))
	}

	const typ, grpcType = "x-content-type", "application/grpc"
	for _, v := range []string{"5", "16", "17", "99", "007", "2147483647", "2147483648", "-", "5x", ""} {
		st := call(typ, grpcType, "x-grpc-status", v, "x-grpc-message", "m")
		code, ok := ParseStatus(v)
		if !ok {
			code = Unknown
		}
		if Code(st.Code()) != code {
			t.Errorf("grpc-status %q: grpc-go says %v (%v), we %v", v, st.Code(), st.Message(), code)
		}
	}
	for raw := range encodedMessages {
		// The server learns the value from the client's metadata, which must be printable ASCII.
		if printable := strings.ReplaceAll(raw, "%", ""); raw == "" || EncodeMessage(printable) != printable {
			continue
		}
		st := call(typ, grpcType, "x-grpc-status", "5", "x-grpc-message", raw)
		if got, want := st.Message(), DecodeMessage(raw); got != want {
			t.Errorf("grpc-message %q: grpc-go reads %q, we %q", raw, got, want)
		}
	}
	for _, c := range []int{200, 201, 204, 301, 400, 401, 403, 404, 405, 408, 413, 415, 418, 429, 500, 501, 502, 503, 504, 505} {
		st := call(typ, "text/html", "x-http", strconv.Itoa(c))
		if got, want := Code(st.Code()), FromHTTPStatus(c); got != want {
			t.Errorf("HTTP %d: grpc-go says %v, we %v", c, got, want)
		}
	}
	for _, tt := range contentKinds {
		if strings.HasPrefix(tt.in, " ") || strings.HasSuffix(tt.in, " ") || tt.in != asciiLower(tt.in) || strings.Contains(tt.in, "\u212a") {
			continue // Trimmed on the way; and grpc-go takes lower case only.
		}
		st := call(typ, tt.in, "x-grpc-status", "5")
		if taken := st.Code() == codes.NotFound && !strings.Contains(st.Message(), "content-type"); taken != (tt.want == GRPC) && tt.in != "" {
			t.Errorf("content-type %q: grpc-go says %v %q, we %v", tt.in, st.Code(), st.Message(), tt.want)
		}
	}
}
