// Package dnstest is a DNS server for tests: a real one, on a loopback port by UDP and TCP, whose records and moods the test
// changes while it runs.
package dnstest

import (
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
)

// zone is what the server speaks for in negative answers.
const zone = "test."

// Server is a DNS server.
type Server struct {
	// Addr is its host:port, by UDP and TCP.
	Addr string

	mu       sync.Mutex
	records  []dns.RR
	negative uint32
	mood     Mood
	queries  []Query
	arrived  chan struct{} // Closed, and made anew, when a query arrives.
}

// Query is a question that was asked.
type Query struct {
	Name    string
	Type    string
	Network string // udp or tcp
}

// Mood answers a query in place of the server. It may change what the server would answer; nil keeps silent.
type Mood func(q Query, answer *dns.Msg) *dns.Msg

// Code is a server that answers everything with an error such as dns.RcodeServerFailure.
func Code(rcode int) Mood {
	return func(_ Query, answer *dns.Msg) *dns.Msg {
		answer.Rcode, answer.Answer, answer.Ns = rcode, nil, nil
		return answer
	}
}

// Silent is a server that answers nothing.
func Silent(Query, *dns.Msg) *dns.Msg { return nil }

// New starts a server, which stops with the test.
func New(t testing.TB) *Server {
	t.Helper()
	s := &Server{arrived: make(chan struct{}), negative: 60}
	packets, listener := listen(t)
	s.Addr = listener.Addr().String()
	handle := func(network string) dns.Handler {
		return dns.HandlerFunc(func(w dns.ResponseWriter, query *dns.Msg) { s.serve(network, w, query) })
	}
	for _, srv := range []*dns.Server{
		{PacketConn: packets, Handler: handle("udp")},
		{Listener: listener, Handler: handle("tcp")},
	} {
		started, done := make(chan struct{}), make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		go func() {
			defer close(done)
			_ = srv.ActivateAndServe()
		}()
		<-started
		t.Cleanup(func() {
			_ = srv.Shutdown()
			<-done
		})
	}
	return s
}

// listen takes a port that is free in both protocols.
func listen(t testing.TB) (net.PacketConn, net.Listener) {
	t.Helper()
	var err error
	for range 20 {
		var l net.Listener
		if l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			break
		}
		var p net.PacketConn
		if p, err = net.ListenPacket("udp", l.Addr().String()); err == nil {
			return p, l
		}
		_ = l.Close()
	}
	t.Fatal(err)
	return nil, nil
}

// Set replaces all records. Each is a line of a zone file: "svc.test. 5 IN A 10.0.0.1".
func (s *Server) Set(t testing.TB, records ...string) {
	t.Helper()
	list := make([]dns.RR, len(records))
	for i, r := range records {
		var err error
		if list[i], err = dns.NewRR(r); err != nil {
			t.Fatal(err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records = list
}

// SetNegative sets how many seconds it holds that there is no such record.
func (s *Server) SetNegative(seconds uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.negative = seconds
}

// SetMood changes how the server answers; nil is its own way.
func (s *Server) SetMood(mood Mood) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mood = mood
}

// Queries returns what was asked so far.
func (s *Server) Queries() []Query {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.queries)
}

// Arrived returns a channel that is closed when the next query arrives.
func (s *Server) Arrived() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.arrived
}

func (s *Server) serve(network string, w dns.ResponseWriter, query *dns.Msg) {
	question := query.Question[0]
	q := Query{Name: question.Name, Type: dns.TypeToString[question.Qtype], Network: network}

	s.mu.Lock()
	s.queries = append(s.queries, q)
	answer := s.answer(query)
	mood := s.mood
	close(s.arrived)
	s.arrived = make(chan struct{})
	s.mu.Unlock()

	if mood != nil {
		if answer = mood(q, answer); answer == nil {
			return
		}
	}
	if network == "udp" {
		size := dns.MinMsgSize
		if opt := query.IsEdns0(); opt != nil {
			size = int(opt.UDPSize())
		}
		answer.Truncate(size)
	}
	_ = w.WriteMsg(answer)
}

// answer finds the records as a resolver does: with the CNAME records on the way to them, and the addresses of SRV
// targets. Its caller holds the lock.
func (s *Server) answer(query *dns.Msg) *dns.Msg {
	q := query.Question[0]
	m := new(dns.Msg).SetReply(query)
	m.RecursionAvailable = true
	if opt := query.IsEdns0(); opt != nil {
		m.SetEdns0(opt.UDPSize(), false)
	}
	name, exists := q.Name, false
	for range 8 {
		next := ""
		for _, rr := range s.records {
			if !strings.EqualFold(rr.Header().Name, name) {
				continue
			}
			exists = true
			if rr.Header().Rrtype == q.Qtype {
				m.Answer = append(m.Answer, dns.Copy(rr))
			} else if cname, ok := rr.(*dns.CNAME); ok {
				m.Answer = append(m.Answer, dns.Copy(rr))
				next = cname.Target
			}
		}
		if next == "" {
			break
		}
		name, exists = next, false
	}
	for _, rr := range m.Answer {
		if srv, ok := rr.(*dns.SRV); ok {
			for _, extra := range s.records {
				if t := extra.Header().Rrtype; strings.EqualFold(extra.Header().Name, srv.Target) && (t == dns.TypeA || t == dns.TypeAAAA) {
					m.Extra = append(m.Extra, dns.Copy(extra))
				}
			}
		}
	}
	if n := len(m.Answer); n == 0 || m.Answer[n-1].Header().Rrtype != q.Qtype {
		if !exists {
			m.Rcode = dns.RcodeNameError
		}
		m.Ns = append(m.Ns, &dns.SOA{
			Hdr: dns.RR_Header{Name: zone, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 3600},
			Ns:  "ns." + zone, Mbox: "root." + zone, Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: s.negative,
		})
	}
	return m
}
