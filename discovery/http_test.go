package discovery

import (
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// listServer serves what the test tells it to.
type listServer struct {
	*httptest.Server

	mu       sync.Mutex
	handler  http.HandlerFunc
	requests []*http.Request
}

func newListServer(t *testing.T, start func(http.Handler) *httptest.Server) *listServer {
	s := new(listServer)
	s.Server = start(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		h := s.handler
		s.requests = append(s.requests, r)
		s.mu.Unlock()
		if h == nil {
			http.Error(w, "not yet", http.StatusServiceUnavailable)
			return
		}
		h(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *listServer) serve(h http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handler = h
}

func (s *listServer) text(text string) {
	s.serve(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(text)) })
}

// askOften is a source that asks the server often.
func askOften(url string) *HTTP { return &HTTP{URL: url, Interval: caddy.Duration(minRefresh)} }

func TestHTTP(t *testing.T) {
	s := newListServer(t, httptest.NewServer)
	h := askOften(strings.Replace(s.URL, "http://", "http://user:secret@", 1) + "/list?token=secret")
	r := watch(t, h)
	r.awaitError(t, s.URL+"/list answered with status 503 Service Unavailable; want 200")
	s.text(`[{"address": "a:1", "weight": 2}]`)
	r.awaitList(t, "a:1,w=2")
	list, _ := r.last()
	if want := s.URL + "/list"; list[0].Origin != want {
		t.Errorf("origin is %q; want %q", list[0].Origin, want)
	}
	s.text(`[{"address": "b:1"}]`)
	r.awaitList(t, "b:1")

	s.text("[")
	r.awaitError(t, s.URL+"/list: line 1: the list breaks off")
	s.text("[]")
	r.awaitList(t)
}

func TestHTTPErrors(t *testing.T) {
	s := newListServer(t, httptest.NewServer)
	h := askOften(strings.Replace(s.URL, "http://", "http://user:secret@", 1) + "/list?token=secret")
	if err := provision(t, h); err != nil {
		t.Fatal(err)
	}
	where := s.URL + "/list"
	a := h.answers()
	defer a.client.CloseIdleConnections()
	r := &reporter{sink: newRecorder()}
	fails := func(want string) {
		t.Helper()
		if next, err := a.look(t.Context(), r); err == nil || next != 0 || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("got %v, error %v; want %q, and no secret", next, err, want)
		}
	}
	fails(where + " answered with status 503 Service Unavailable; want 200")
	s.text("[\n{\"address\": \"b\"}]")
	fails("the answer of " + where + `: line 2: entry 1: address: upstream address "b" has no port`)
	s.serve(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/other", http.StatusFound) })
	fails(where + " answered with status 302 Found")
	s.serve(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotModified) }) // Nobody asked for that.
	fails(where + " answered with status 304 Not Modified")
	s.serve(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		_, _ = w.Write([]byte("["))
	})
	fails("reading the answer of " + where + ": unexpected EOF")
	s.Close()
	fails("asking " + where + ": ")
}

// TestHTTPConditional: the server is asked for what is new only, and for everything after an answer that was not understood.
func TestHTTPConditional(t *testing.T) {
	s := newListServer(t, httptest.NewServer)
	var (
		mu          sync.Mutex
		etag, text  string
		notModified int
		full        int
	)
	set := func(e, s string) {
		mu.Lock()
		defer mu.Unlock()
		etag, text, notModified, full = e, s, 0, 0
	}
	counts := func() (int, int) {
		mu.Lock()
		defer mu.Unlock()
		return notModified, full
	}
	const date = "Mon, 02 Nov 2026 10:00:00 GMT"
	set(`"1"`, `[{"address": "a:1"}]`)
	s.serve(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		w.Header().Set("ETag", etag)
		w.Header().Set("Last-Modified", date)
		if r.Header.Get("If-None-Match") == etag {
			if r.Header.Get("If-Modified-Since") != date {
				t.Error("If-Modified-Since is missing")
			}
			notModified++
			w.WriteHeader(http.StatusNotModified)
			return
		}
		full++
		_, _ = w.Write([]byte(text))
	})
	r := watch(t, askOften(s.URL))
	r.awaitList(t, "a:1")
	waitFor(t, func() bool { n, _ := counts(); return n >= 2 })
	if _, full := counts(); full != 1 {
		t.Errorf("the same list was sent %d times", full)
	}
	set(`"2"`, `[{"address": "b:1"}]`)
	r.awaitList(t, "b:1")
	set(`"3"`, `[{`)
	r.awaitError(t, "the list breaks off")
	waitFor(t, func() bool { n, full := counts(); return n == 0 && full >= 2 })
	set(`"2"`, `[{"address": "b:1"}]`) // Back to what it was: 304, and yet the sink hears that all is well.
	before, _ := r.count()
	waitFor(t, func() bool { n, _ := r.count(); return n == before+1 })
	if n, full := counts(); n == 0 || full != 0 {
		t.Errorf("%d answers 304, %d full", n, full)
	}
	r.awaitList(t, "b:1")
}

func TestHTTPRefresh(t *testing.T) {
	s := newListServer(t, httptest.NewServer)
	s.text(`[{"address": "a:1"}]`)
	h := &HTTP{URL: s.URL, Interval: caddy.Duration(time.Hour)}
	r := watch(t, h)
	r.awaitList(t, "a:1")
	s.text(`[{"address": "b:1"}]`)
	h.Refresh()
	r.awaitList(t, "b:1")
}

func TestHTTPHeaders(t *testing.T) {
	s := newListServer(t, httptest.NewServer)
	s.text(`[{"address": "a:1"}]`)
	h := askOften(s.URL)
	h.Headers = http.Header{"x-token": {"{file." + writeFile(t, "token", "secret\n") + "}"}, "Host": {"lists.example.com"}}
	watch(t, h).awaitList(t, "a:1")
	s.mu.Lock()
	defer s.mu.Unlock()
	got := s.requests[0]
	if got.Header.Get("X-Token") != "secret" || got.Host != "lists.example.com" || got.Header.Get("Accept") != "application/json" || got.Method != "GET" {
		t.Errorf("got %s %s %v", got.Method, got.Host, got.Header)
	}
}

// TestHTTPTooLarge: a small answer that unpacks into a large one is refused as well.
func TestHTTPTooLarge(t *testing.T) {
	s := newListServer(t, httptest.NewServer)
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, _ = w.Write([]byte("[" + strings.Repeat(" ", maxListSize) + "]"))
	_ = w.Close()
	s.serve(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(packed.Bytes())
	})
	watch(t, askOften(s.URL)).awaitError(t, "is larger than 32 MiB")
}

func TestHTTPTimeout(t *testing.T) {
	s := newListServer(t, httptest.NewServer)
	done := make(chan struct{})
	t.Cleanup(func() { close(done) })
	s.serve(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-done:
		}
	})
	h := askOften(s.URL)
	h.Timeout = caddy.Duration(100 * time.Millisecond)
	watch(t, h).awaitError(t, "Client.Timeout exceeded")
}

func TestHTTPTLS(t *testing.T) {
	s := newListServer(t, func(h http.Handler) *httptest.Server {
		s := httptest.NewUnstartedServer(h)
		s.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
		s.Config.ErrorLog = nil
		s.StartTLS()
		return s
	})
	s.text(`[{"address": "a:1"}]`)
	watch(t, askOften(s.URL)).awaitError(t, "certificate")

	ca := filepath.Join(t.TempDir(), "ca.pem")
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(ca, cert, 0o600); err != nil {
		t.Fatal(err)
	}
	h := askOften(s.URL)
	h.TLS = &reverseproxy.TLSConfig{CARaw: []byte(`{"provider": "file", "pem_files": ["` + ca + `"]}`), ServerName: "example.com"}
	watch(t, h).awaitList(t, "a:1")
}

func TestHTTPConfig(t *testing.T) {
	refused(t, &HTTP{}, "url is missing")
	for _, u := range []string{"localhost", "ftp://a/b", "http://", "http://{http.request.host}/", "://"} {
		refused(t, &HTTP{URL: u}, "is none that can be asked; write http://host/path")
	}
	refused(t, &HTTP{URL: "http://a", Interval: 1}, "refresh is 1ns")
	refused(t, &HTTP{URL: "http://a", Timeout: -1}, "timeout is -1ns")
	refused(t, &HTTP{URL: "http://a", Headers: http.Header{"a b": {"c"}}}, `"a b" is not the name of a header field`)
	refused(t, &HTTP{URL: "http://a", Headers: http.Header{"A": {"b\nc"}}}, "the value of A has a line break")
	refused(t, &HTTP{URL: "http://a", TLS: new(reverseproxy.TLSConfig)}, "tls is configured, but url")
	refused(t, &HTTP{URL: "https://a", TLS: &reverseproxy.TLSConfig{Curves: []string{"flat"}}}, "tls: ")
	runCaddyfile(t, []caddyfileCase{
		{input: "http http://localhost/list", json: `{"url":"http://localhost/list"}`},
		{input: `http https://localhost/list {
			refresh 5s
			timeout 1s
			header Authorization "Bearer {file./run/token}"
			header X-A b
			header X-A c
			tls_server_name name
			tls_trust_pool file /ca.pem
			tls_client_auth cert.pem key.pem
			tls_curves x25519
			tls_renegotiation never
			tls_insecure_skip_verify
		}`, json: `{"url":"https://localhost/list","refresh":5000000000,"timeout":1000000000,` +
			`"headers":{"Authorization":["Bearer {file./run/token}"],"X-A":["b","c"]},` +
			`"tls":{"ca":{"pem_files":["/ca.pem"],"provider":"file"},"client_certificate_file":"cert.pem","client_certificate_key_file":"key.pem",` +
			`"insecure_skip_verify":true,"server_name":"name","renegotiation":"never","curves":["x25519"]}}`},
		{input: "http", err: "wrong argument count"},
		{input: "http a b", err: "wrong argument count"},
		{input: "http a {\n header b\n}", err: "wrong argument count"},
		{input: "http a {\n interval 5s\n}", err: `unrecognized subdirective "interval"; expected refresh, timeout, header`},
		{input: "http a {\n timeout 0s\n}", err: `timeout: "0s" is not positive`},
		{input: "http a {\n tls_server_name\n}", err: "wrong argument count"},
		{input: "http a {\n tls_what\n}", err: `unrecognized subdirective "tls_what"; expected tls_server_name`},
		{input: "http a {\n tls_trust_pool\n}", err: "wrong argument count"},
		{input: "http a {\n tls_trust_pool nobody\n}", err: "tls.ca_pool.source.nobody"},
		{input: "http a {\n tls_trust_pool file a\n tls_trust_pool file b\n}", err: "tls_trust_pool is given twice"},
		{input: "http a {\n tls_client_auth a b c\n}", err: "wrong argument count"},
		{input: "http a {\n tls_client_auth a\n tls_client_auth a\n}", err: "tls_client_auth is given twice"},
		{input: "http a {\n tls_insecure_skip_verify\n tls_insecure_skip_verify\n}", err: "tls_insecure_skip_verify is given twice"},
		{input: "http a {\n tls_insecure_skip_verify yes\n}", err: "wrong argument count"},
		{input: "http a {\n tls_curves\n}", err: "wrong argument count"},
	})
}
