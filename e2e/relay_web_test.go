package e2e

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// webRequest is a request for a web page.
type webRequest struct {
	method, path, host string
	fields             []string // names and values in turn
	body               string
}

// webAnswer is what came back.
type webAnswer struct {
	status          int
	proto           string
	header, trailer string
	length          int64
	body            string
}

func (a webAnswer) String() string {
	body := a.body
	if len(body) > 200 {
		body = fmt.Sprintf("%.100q… (%d bytes)", body, len(body))
	}
	return fmt.Sprintf("%s %d, length %d, header [%s], trailer [%s]: %s", a.proto, a.status, a.length, a.header, a.trailer, body)
}

// fetch makes a request on a connection of its own. cfg: with TLS, by the first of its protocols; without, HTTP/2.
func fetch(t *testing.T, p *proxytest.Proxy, addr string, cfg *tls.Config, r webRequest) webAnswer {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: cfg, DisableCompression: true, Protocols: new(http.Protocols), ExpectContinueTimeout: timeout}
	defer tr.CloseIdleConnections()
	scheme := "https"
	switch {
	case cfg == nil:
		scheme = "http"
		tr.Protocols.SetUnencryptedHTTP2(true)
	case cfg.NextProtos[0] == "h2":
		tr.Protocols.SetHTTP2(true)
	default:
		tr.Protocols.SetHTTP1(true)
	}
	return fetchBy(t, p, tr, scheme+"://"+addr, r)
}

func fetchBy(t *testing.T, p *proxytest.Proxy, tr http.RoundTripper, base string, r webRequest) webAnswer {
	t.Helper()
	var body io.Reader = http.NoBody
	if r.body != "" {
		body = strings.NewReader(r.body)
	}
	req, err := http.NewRequestWithContext(within(t, 4*timeout), r.method, base+r.path, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = r.host
	for f := range slices.Chunk(r.fields, 2) {
		req.Header.Add(f[0], f[1])
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", r.method, r.path, err)
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", r.method, r.path, err)
	}
	resp.Header.Del("Date")
	return webAnswer{
		resp.StatusCode, resp.Proto, unport(p, sorted(resp.Header)), unport(p, sorted(resp.Trailer)), resp.ContentLength, unport(p, string(all)),
	}
}

// sorted is a header in one line.
func sorted(h http.Header) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(h)) {
		fmt.Fprintf(&b, "%s: %q ", name, h[name])
	}
	return b.String()
}

// unport takes out of a text what differs from Caddy to Caddy.
func unport(p *proxytest.Proxy, text string) string {
	for _, addr := range []string{p.H2C, p.TLS} {
		if _, port, err := net.SplitHostPort(addr); err == nil {
			text = strings.ReplaceAll(text, port, "PORT")
		}
	}
	return text
}

// webSite has pages of all kinds.
const webSite = `
root * %[1]s
encode /encoded* gzip
templates /page.html
basic_auth /auth* {
	user $2a$04$zptrg1hDjXMY15hSiWZamOEO7LB.SoYccyopmVKzX3Xw9pPekzejG
}
header /header* {
	X-A b
	-Server
	defer
}
request_body /small* {
	max_size 10
}
redir /redir /elsewhere
error /error 503
respond /respond "text" 201
respond /encoded "%[3]s"
respond /auth "in, {http.auth.user.id}"
respond /header "ok"
respond /vars "{method} {proto} {scheme} {hostport} {uri} {query} {http.request.remote.host} {http.request.local.port} {client_ip} {tls_version}"
reverse_proxy /up* %[2]s {
	flush_interval -1
	header_down X-Down d
}
file_server
handle_errors {
	respond "error {err.status_code}"
}
`

// startWeb runs what reverse_proxy has for an upstream.
func startWeb(t *testing.T) (addr string) {
	t.Helper()
	l, addr := listen(t)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			echo(t, w)
			return
		}
		body, err := io.ReadAll(r.Body)
		w.Header().Set("Trailer", "X-Sum")
		w.Header()["Date"] = nil
		n, _ := io.WriteString(w, r.Method+" "+r.RequestURI+" "+sorted(r.Header)+"\n")
		_ = http.NewResponseController(w).Flush()
		m, _ := w.Write(body)
		w.Header().Set("X-Sum", fmt.Sprint(n, m, err))
	}), ReadHeaderTimeout: timeout}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close() })
	return addr
}

// echo speaks the protocol "echo".
func echo(t *testing.T, w http.ResponseWriter) {
	nc, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	defer nc.Close()
	_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	_ = rw.Flush()
	_, _ = io.Copy(nc, rw)
}

// webRequests are for every page.
func webRequests() []webRequest {
	big := strings.Repeat("0123456789abcdef", 1<<16)
	all := []webRequest{
		{path: "/"},
		{path: "/file.txt"},
		{method: "HEAD", path: "/file.txt"},
		{path: "/file.txt", fields: []string{"Range", "bytes=2-5"}},
		{path: "/file.txt", fields: []string{"If-Modified-Since", "Fri, 01 Jan 2100 00:00:00 GMT"}},
		{path: "/file.txt", fields: []string{"If-Match", `"no"`}},
		{method: "POST", path: "/file.txt", body: "x"},
		{path: "/big.bin"},
		{path: "/dir"},
		{path: "/dir/"},
		{path: "/none"},
		{path: "/a%2fb/../file.txt"},
		{path: "/page.html?a=1"},
		{path: "/encoded"},
		{path: "/encoded", fields: []string{"Accept-Encoding", "gzip"}},
		{path: "/encoded", fields: []string{"Accept-Encoding", "br"}},
		{path: "/auth"},
		{path: "/auth", fields: []string{"Authorization", "Basic dXNlcjpzZWNyZXQ="}},
		{path: "/auth", fields: []string{"Authorization", "Basic dXNlcjp3cm9uZw=="}},
		{path: "/header"},
		{path: "/redir"},
		{path: "/error"},
		{path: "/respond"},
		{method: "DELETE", path: "/respond"},
		{method: "PROPFIND", path: "/vars"},
		{path: "/vars?q=%20&r"},
		{path: "/vars", fields: []string{"X-Forwarded-For", "192.0.2.1", "X-Forwarded-Proto", "https"}},
		{path: "/up"},
		{path: "/up?a=b", fields: []string{"Cookie", "a=1", "Cookie", "b=2", "X-Two", "1", "X-Two", "2", "X-Forwarded-For", "192.0.2.1", "Te", "trailers"}},
		{method: "POST", path: "/up", body: "body", fields: []string{"Expect", "100-continue"}},
		{method: "POST", path: "/up", body: big},
		{method: "OPTIONS", path: "/up"},
		{path: "/up", fields: []string{"X_Under_Score", "1", "X.Dot", "2"}},
		{method: "POST", path: "/small/up", body: big},
		{path: "/respond", fields: []string{"X-Large", strings.Repeat("x", 15<<10)}},
		{path: "/respond", host: "other.example"},
		{path: "/respond", host: "other.example:99"},
	}
	for i := range all {
		if all[i].method == "" {
			all[i].method = "GET"
		}
		if all[i].host == "" {
			all[i].host = "localhost"
		}
	}
	return all
}

// TestRelayWeb: web pages are the same with and without grpc_relay, byte for byte, and so is what the access log has.
func TestRelayWeb(t *testing.T) {
	ca := wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	dir := t.TempDir()
	for name, text := range map[string]string{
		"file.txt": "0123456789", "big.bin": strings.Repeat("big ", 1<<19), "page.html": "{{.Host}} {{.OriginalReq.URL.RawQuery}}", "dir/index.html": "index",
	} {
		file := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		writeText(t, file, text)
	}
	site := fmt.Sprintf(webSite, dir, startWeb(t), strings.Repeat("encoded ", 1000))
	one, two := ca.ClientConfig(), ca.ClientConfig()
	one.NextProtos, one.ServerName, two.ServerName = []string{"http/1.1"}, "localhost", "localhost"
	transports := []struct {
		name string
		tr   func() *http.Transport
		tls  bool
	}{
		{"http1", func() *http.Transport { return webTransport(nil, (*http.Protocols).SetHTTP1) }, false},
		{"h2c", func() *http.Transport { return webTransport(nil, (*http.Protocols).SetUnencryptedHTTP2) }, false},
		{"http1_tls", func() *http.Transport { return webTransport(one, (*http.Protocols).SetHTTP1) }, true},
		{"h2", func() *http.Transport { return webTransport(two, (*http.Protocols).SetHTTP2) }, true},
	}
	requests := webRequests()
	collect := func(t *testing.T, servers string) (answers [][]webAnswer, logged []string) {
		wiretest.CheckLeaks(t)
		p := proxytest.Start(t, proxytest.Options{Site: site, Servers: servers, CertFile: cert, KeyFile: key, AccessLog: true})
		n := 0
		for _, x := range transports {
			tr, base := x.tr(), "http://"+p.H2C
			if x.tls {
				base = "https://" + p.TLS
			}
			var got []webAnswer
			for _, r := range requests {
				got = append(got, fetchBy(t, p, tr, base, r))
				n++
			}
			tr.CloseIdleConnections()
			answers = append(answers, got)
		}
		eventually(t, "all requests are in the access log", func() bool { return len(p.Log("http.log.access")) >= n })
		for _, e := range p.Log("http.log.access") {
			r, _ := e["request"].(map[string]any)
			logged = append(logged, unport(p, fmt.Sprint(
				r["proto"], r["method"], r["host"], r["uri"], r["headers"], r["remote_ip"], r["client_ip"], e["status"], e["size"], e["bytes_read"], e["resp_headers"], e["user_id"],
			)))
		}
		slices.Sort(logged) // a line may come after the next request
		return answers, logged
	}
	var with, without [][]webAnswer
	var withLog, withoutLog []string
	t.Run("stock", func(t *testing.T) { without, withoutLog = collect(t, "") })
	t.Run("relay", func(t *testing.T) { with, withLog = collect(t, withRelay) })
	if t.Failed() {
		return
	}
	for i, x := range transports {
		for j, r := range requests {
			if with[i][j] != without[i][j] {
				t.Errorf("%s: %s %s %.100q\n%v\nwithout grpc_relay\n%v", x.name, r.method, r.path, r.fields, with[i][j], without[i][j])
			}
		}
	}
	if len(withLog) != len(withoutLog) {
		t.Fatalf("%d lines in the access log, without grpc_relay %d", len(withLog), len(withoutLog))
	}
	for i := range withLog {
		if a, b := undated(withLog[i]), undated(withoutLog[i]); a != b {
			t.Errorf("the access log has\n%.600s\nwithout grpc_relay\n%.600s", a, b)
		}
	}
}

// undated takes the values of Date out of a line.
func undated(line string) string {
	for {
		before, rest, ok := strings.Cut(line, "Date:[")
		if !ok {
			return line
		}
		_, after, _ := strings.Cut(rest, "]")
		line = before + after
	}
}

func webTransport(cfg *tls.Config, set func(*http.Protocols, bool)) *http.Transport {
	tr := &http.Transport{TLSClientConfig: cfg, DisableCompression: true, Protocols: new(http.Protocols), ExpectContinueTimeout: timeout}
	set(tr.Protocols, true)
	return tr
}

// TestRelayUpgrade: a connection that changes its protocol on HTTP/1.1 belongs to the two ends.
func TestRelayUpgrade(t *testing.T) {
	ca := wiretest.NewCA(t)
	cert, key := ca.PairFiles(ca.ServerCert())
	up := startWeb(t)
	p := proxytest.Start(t, proxytest.Options{Site: "reverse_proxy " + up, Servers: withRelay, CertFile: cert, KeyFile: key})
	cfg := ca.ClientConfig()
	cfg.NextProtos, cfg.ServerName = []string{"http/1.1"}, "localhost"
	for _, secure := range []bool{false, true} {
		addr := p.H2C
		if secure {
			addr = p.TLS
		}
		nc := wiretest.DialRaw(t, addr)
		if secure {
			nc = tls.Client(nc, cfg)
		}
		_ = nc.SetDeadline(time.Now().Add(4 * timeout))
		if _, err := io.WriteString(nc, "GET /up HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		br := bufio.NewReader(nc)
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("%s", resp.Status)
		}
		for range 3 {
			want := bytes.Repeat([]byte("frame"), 2_000)
			if _, err := nc.Write(want); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want))
			if _, err := io.ReadFull(br, got); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%.40q, error %v", got, err)
			}
		}
		nc.Close()
	}
}
