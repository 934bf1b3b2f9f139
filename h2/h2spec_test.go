package h2

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"strconv"
	"testing"

	"github.com/summerwind/h2spec/config"
	"github.com/summerwind/h2spec/generic"
	"github.com/summerwind/h2spec/hpack"
	"github.com/summerwind/h2spec/http2"
	"github.com/summerwind/h2spec/spec"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// h2spec is an independent reading of RFC 7540 and RFC 7541, case by case. All its cases pass, those for a SHOULD (strict) included.
//
// It takes the end of the connection for any error that it waits for. So it is run against connections, too, that the engine cannot
// close: there only the codes in RST_STREAM and GOAWAY count.
func TestH2spec(t *testing.T) {
	t.Run("plaintext", func(t *testing.T) {
		runH2spec(t, nil, func(t *testing.T) *config.Config {
			addr, _ := serve(t, Config{}, acceptPage)
			return h2specConfig(t, addr, false)
		})
	})
	t.Run("tls", func(t *testing.T) {
		server := wiretest.NewCA(t).ServerConfig()
		runH2spec(t, nil, func(t *testing.T) *config.Config {
			addr, _ := serveTLS(t, server, acceptPage)
			return h2specConfig(t, addr, true)
		})
	})
	t.Run("never closed", func(t *testing.T) {
		runH2spec(t, waitForTheEnd, func(t *testing.T) *config.Config {
			addr, _ := serveOn(t, unclosing{listen(t), t}, Config{}, acceptPage)
			return h2specConfig(t, addr, false)
		})
	})
}

// waitForTheEnd has the cases whose rule is that the connection ends.
var waitForTheEnd = map[string]bool{
	"http2/3.5/2":   true, // Sends invalid connection preface
	"http2/5.4.1/1": true, // Sends an invalid PING frame for connection close
}

// runH2spec runs all cases but some, each with a server of its own.
func runH2spec(t *testing.T, but map[string]bool, start func(*testing.T) *config.Config) {
	wiretest.CheckLeaks(t)
	ran := 0
	for _, g := range []*spec.TestGroup{generic.Spec(), http2.Spec(), hpack.Spec()} {
		eachCase(g, func(id string, c *spec.TestCase) {
			if ran++; but[id] {
				return
			}
			t.Run(id, func(t *testing.T) {
				t.Parallel()
				runCase(t, c, start(t))
			})
		})
	}
	if ran < 146 {
		t.Errorf("h2spec has %d cases, want all", ran)
	}
}

// eachCase walks the cases as h2spec does, and names them as its command does.
func eachCase(g *spec.TestGroup, f func(id string, c *spec.TestCase)) {
	n := 0
	for _, cases := range [][]*spec.TestCase{g.Tests, g.StrictTests} {
		for _, c := range cases {
			n++
			f(fmt.Sprintf("%s/%d", g.ID(), n), c)
		}
	}
	for _, sub := range g.Groups {
		eachCase(sub, f)
	}
}

func runCase(t *testing.T, c *spec.TestCase, cfg *config.Config) {
	conn, err := spec.Dial(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	err = c.Run(cfg, conn)
	if e := (*spec.TestError)(nil); errors.As(err, &e) {
		t.Fatalf("%s\n%s\nexpected: %q\nactual: %s", c.Desc, c.Requirement, e.Expected, e.Actual)
	}
	if err != nil { // ErrSkipped too: the server has all that a case needs
		t.Fatalf("%s\n%s\n%v", c.Desc, c.Requirement, err)
	}
}

// h2specConfig says where the server is. No case passes by waiting, so the timeout is only how long a failure takes.
func h2specConfig(t *testing.T, addr string, secure bool) *config.Config {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return &config.Config{
		Host: host, Port: n, Path: "/", TLS: secure, Insecure: true,
		Timeout: patienceOfTests, MaxHeaderLen: 4000, Strict: true,
	}
}

// page answers every request, when it has ended, with some text.
type page struct{ echo }

func acceptPage(s *Stream, _ []Field, end bool) Receiver {
	p := &page{}
	if end {
		p.answer(s)
	}
	return p
}

func (p *page) RecvData(s *Stream, b []byte, end bool) {
	s.Consumed(len(b))
	if end {
		p.answer(s)
	}
}

func (p *page) RecvTrailers(s *Stream, _ []Field) { p.answer(s) }

func (p *page) answer(s *Stream) {
	_ = s.WriteHeaders(responseHead, false)
	p.push(s, bytes.Repeat([]byte("h2spec "), 20), true)
}

// unclosing accepts connections that stay open until the test ends.
type unclosing struct {
	net.Listener
	t *testing.T
}

func (l unclosing) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.t.Cleanup(func() { nc.Close() })
	return unclosed{nc}, nil
}

type unclosed struct{ net.Conn }

func (unclosed) Close() error { return nil }
