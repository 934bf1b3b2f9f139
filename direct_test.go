package grpcproxy_test

import (
	"crypto/tls"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	grpcproxy "github.com/caddygrpc/caddy-grpc-proxy"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// bothWays are the tests whose rules are the same on both inbounds: as tests of their own they go through Caddy's server
// (inbound/web), in TestDirect on connections that package h2 reads (inbound/direct).
var bothWays = []func(*testing.T){
	TestWireConnectionError,
	TestWireForeignBodyStalls,
	TestWireCancelBudget,
	TestWireLargeMetadataApart,
	TestWireMetadataLimits,
	TestWireGoAwayWithError,
	TestWireCancelsOfOthers,
	TestWireTookApart,
	TestWireCancel,
	TestWireCancelWaiting,
	TestWireClientGoAway,
	TestWireResetAfterEnd,
	TestWireFullDuplex,
	TestWireDataSplits,
	TestWireBackPressure,
	TestWireRequestTrailers,
	TestWireTimeoutForwarded,
	TestWireTimeoutAfterQueue,
	TestWireMaxTimeout,
	TestWireTimeoutMalformed,
	TestWireDeadline,
	TestWireDeadlineWaiting,
	TestWireDeadlineBlocked,
	TestWireDeadlineRace,
	TestWireDialFailures,
	TestWireDialTLS,
	TestWireDialElsewhere,
	TestWireNoUsableUpstream,
	TestWireBackAgain,
	TestWireWaitsForRedial,
	TestWireSlowConnections,
	TestWireFullUntilOneIsNot,
	TestWireEarlyEnd,
	TestWireEarlyEndWhileSending,
	TestWireEmptyCall,
	TestWireStreamIdleTimeout,
	TestWireStreamTimeout,
	TestWireSilentStream,
	TestWireFailureLog,
	TestWireMadeContentType,
	TestWireRequestLength,
	TestWireNotGRPC,
	TestWireBadPath,
	TestWireOddPaths,
	TestWireCallIsSeenOnce,
	TestWireRequestHead,
	TestWireRequestHopByHop,
	TestWireRequestAuthority,
	TestWireForwarded,
	TestWireRequestTooLarge,
	TestWireHeaderOps,
	TestWireReset,
	TestWireMessageBoundary,
	TestWireConnectionLost,
	TestWireGoAwayText,
	TestWireGoAwayReplay,
	TestWireGoAwayGraceful,
	TestWireRefused,
	TestWireReplayLimit,
	TestWireReplayBlocked,
	TestWireCommitted,
	TestWireNoTrailers,
	TestWireNoFalseOK,
	TestWireGarbledStatus,
	TestWireHTTPStatus,
	TestWireHTTPHugeBody,
	TestWireHTTPBrokenBody,
	TestWireHTTPWithStatus,
	TestWireResponseHeads,
	TestWireMalformedAnswers,
	TestWireOversizedMetadata,
	TestWireExposeUpstream,
	TestWireAlwaysLegal,
	TestWireTrailers,
	TestWireLargeTrailers,
	TestWireNoMessages,
	TestWireTrailersOnly,
	TestWireHead,
	TestMinConns,
	TestQueueFullStatus,
	TestNoTimeNoAttempt,
	TestInterop,
	TestCallsKeepApart,
}

// webOnly are the other ones, and what they are about.
var webOnly = map[string]string{
	"TestCancelledCallsAreForgotten":    "a handler in front",
	"TestConnectionOptions":             "HTTP/1.1",
	"TestConnectionsLogAsConfiguredNow": "the way to the upstream, with no call of a client",
	"TestMadeFieldsAreValid":            "placeholders of requests",
	"TestMaxConnsOfTwoHandlers":         "routes to several handlers",
	"TestPanicWhileOpening":             "handlers in front",
	"TestPanicWhileSending":             "handlers in front",
	"TestPanics":                        "handlers in front",
	"TestRequestContextDeadline":        "a handler in front",
	"TestSchemeOfExceptedPort":          "the way to the upstream",
	"TestWireAccessLog":                 "access logs are the server's",
	"TestWireAccessLogHeader":           "access logs are the server's",
	"TestWireClientWindows":             "the windows are settings of Go's server",
	"TestWireGoneBeforeSent":            "a handler in front",
	"TestWireHTTP1":                     "HTTP/1.1",
	"TestWireHealthAnswer":              "another handler",
	"TestWireHealthFailures":            "another handler",
	"TestWireHealthPassesOn":            "another handler",
	"TestWireHealthWatch":               "another handler",
	"TestWireLostTrailers":              "what Go's server cannot send",
	"TestWireMatcherInCEL":              "handlers in front",
	"TestWireNamesBeforeTheHandler":     "handlers in front",
	"TestWireNamesInRespond":            "another handler",
	"TestWireNobodyTakesIt":             "what is passed on goes to the next handler",
	"TestWireRequestLengthOfHTTP3":      "HTTP/3",
	"TestWireRespond":                   "another handler",
	"TestWireServersOwnFields":          "what the server adds to answers",
	"TestWireWriteTimeout":              "limits of the server",
}

// onHop are those of the other ones that are the same behind grpc_relay. TestWireGoneBeforeSent is not: what is reset at once does not come
// as far as the server. TestWireClientWindows and TestWireRequestLengthOfHTTP3 do not concern it.
var onHop = []func(*testing.T){
	TestCancelledCallsAreForgotten,
	TestMadeFieldsAreValid,
	TestMaxConnsOfTwoHandlers,
	TestPanicWhileOpening,
	TestPanicWhileSending,
	TestPanics,
	TestRequestContextDeadline,
	TestSchemeOfExceptedPort,
	TestWireAccessLog,
	TestWireAccessLogHeader,
	TestWireHTTP1,
	TestConnectionOptions,
	TestWireHealthAnswer,
	TestWireHealthFailures,
	TestWireHealthPassesOn,
	TestWireHealthWatch,
	TestWireLostTrailers,
	TestWireMatcherInCEL,
	TestWireNamesBeforeTheHandler,
	TestWireNamesInRespond,
	TestWireNobodyTakesIt,
	TestWireRespond,
	TestWireServersOwnFields,
	TestWireWriteTimeout,
}

// inDirect begins the names of tests that run on inbound/direct.
const inDirect = "TestDirect/"

// onDirect tells whether the test, or the row of its table, runs on inbound/direct.
func onDirect(t *testing.T) bool { return strings.HasPrefix(t.Name(), inDirect) }

// TestDirect runs the tests past Caddy's server.
func TestDirect(t *testing.T) {
	for _, test := range bothWays {
		t.Run(nameOf(test), test)
	}
}

// overHop begins the names of tests that run on Caddy's server behind grpc_relay.
const overHop = "TestHop/"

// isOverHop tells whether the test, or the row of its table, runs behind grpc_relay.
func isOverHop(t *testing.T) bool { return strings.HasPrefix(t.Name(), overHop) }

// TestHop runs the tests of both inbounds, and those that need Caddy's server, behind grpc_relay.
func TestHop(t *testing.T) {
	for _, test := range slices.Concat(bothWays, onHop) {
		t.Run(nameOf(test), test)
	}
}

// nameOf is the name of a test's function.
func nameOf(test func(*testing.T)) string {
	name := runtime.FuncForPC(reflect.ValueOf(test).Pointer()).Name()
	return name[strings.LastIndexByte(name, '.')+1:]
}

// Each test that has a client runs on both inbounds, or says why it does not.
func TestBothWays(t *testing.T) {
	both := make(map[string]bool)
	for _, test := range bothWays {
		both[nameOf(test)] = true
	}
	for _, name := range rigTests(t) {
		if reason := webOnly[name]; both[name] == (reason != "") {
			t.Errorf("%s must be either in bothWays or, with what it is about, in webOnly", name)
		}
		delete(both, name)
	}
	if len(both) > 0 {
		t.Errorf("there are no tests %v", slices.Collect(maps.Keys(both)))
	}
}

// rigTests are the names of the tests that make a rig.
func rigTests(t *testing.T) (names []string) {
	t.Helper()
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || !strings.HasPrefix(fn.Name.Name, "Test") {
				continue
			}
			makes := false
			ast.Inspect(fn, func(n ast.Node) bool {
				id, ok := n.(*ast.Ident)
				makes = makes || ok && (id.Name == "newRig" || id.Name == "healthRig")
				return !makes
			})
			if makes {
				names = append(names, fn.Name.Name)
			}
		}
	}
	return names
}

// listenDirect serves the clients of a test past Caddy, in plaintext and where Caddy has TLS with that.
func (r *rig) listenDirect(o rigOptions) {
	r.t.Helper()
	r.H2C = r.serveDirect(o, nil)
	if o.Caddy.CertFile == "" {
		return
	}
	pair, err := tls.LoadX509KeyPair(o.Caddy.CertFile, o.Caddy.KeyFile)
	if err != nil {
		r.t.Fatal(err)
	}
	r.TLS = r.serveDirect(o, &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12})
}

// serveDirect returns the address of a listener whose connections go to the handler that runs when they come.
func (r *rig) serveDirect(o rigOptions, cfg *tls.Config) string {
	r.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		r.t.Fatal(err)
	}
	var (
		accepting sync.WaitGroup
		mu        sync.Mutex
		conns     []*h2.Conn
	)
	serve := func(nc net.Conn) {
		if cfg != nil {
			tc := tls.Server(nc, cfg)
			if tc.Handshake() != nil {
				_ = nc.Close()
				return
			}
			nc = tc
		}
		h := grpcproxy.Direct()
		h.Trusted = slices.Concat(h.Trusted, o.Trusted)
		c := h.Serve(nc, h2.Config{InitialWindow: 512 << 10, InitialConnWindow: 16 << 20, MaxConnWindow: 16 << 20}) // as Caddy has them
		mu.Lock()
		conns = append(conns, c)
		mu.Unlock()
	}
	accepting.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			accepting.Go(func() { serve(nc) })
		}
	})
	r.t.Cleanup(func() {
		_ = l.Close()
		accepting.Wait()
		for _, c := range conns {
			c.Close(h2.NoError, "")
			<-c.Done()
		}
	})
	return l.Addr().String()
}
