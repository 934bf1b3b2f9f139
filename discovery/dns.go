package discovery

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// udpSize is the largest answer by UDP that is asked for: it passes without fragments nearly everywhere (DNS Flag Day
// 2020). What is larger comes truncated, and is asked for again by TCP.
const udpSize = 1232

// maxChain bounds how many CNAME records are followed.
const maxChain = 16

// noRecordsError is the error for a name that does not exist, or has no records of the type: the server knows that there is
// nothing, as opposed to a server that does not answer or is in trouble.
type noRecordsError struct {
	name   string
	exists bool          // Whether there is such a name, with records of other types (NODATA), or not (NXDOMAIN).
	ttl    time.Duration // How long that holds.
}

func (e *noRecordsError) Error() string {
	if e.exists {
		return fmt.Sprintf("DNS has no such record for the name %s", e.name)
	}
	return fmt.Sprintf("DNS has no name %s", e.name)
}

// dnsClient asks DNS servers.
type dnsClient struct {
	dialer net.Dialer
}

// records asks for a name's records of one type, which may be behind CNAME records. ttl is the shortest on the way.
// extra are the records that the server thought would be asked for next.
func (c *dnsClient) records(ctx context.Context, o *resolveOptions, first int, name string, qtype uint16) (list, extra []dns.RR, ttl time.Duration, err error) {
	ttl = maxTTL
	asked := name
	for range maxChain {
		msg, err := c.ask(ctx, o, first, name, qtype)
		if err != nil {
			return nil, nil, 0, fmt.Errorf("looking up %s of %s: %w", dns.TypeToString[qtype], asked, err)
		}
		list, end, linkTTL := follow(msg.Answer, name, qtype)
		ttl = min(ttl, linkTTL)
		switch negative, known := negativeTTL(msg); {
		case len(list) > 0:
			return list, msg.Extra, ttl, nil
		case msg.Rcode == dns.RcodeNameError, known, end == name:
			// RFC 2308, section 2.1: the error is the name's at the end of the chain.
			return nil, nil, 0, &noRecordsError{name: asked, exists: msg.Rcode != dns.RcodeNameError, ttl: min(ttl, negative)}
		}
		name = end // The server leaves the rest of the chain to us.
	}
	return nil, nil, 0, fmt.Errorf("looking up %s of %s: more than %d CNAME records in a row", dns.TypeToString[qtype], asked, maxChain)
}

// maxTTL is longer than any refresh. RFC 2181, section 8: a TTL has 31 bits.
const maxTTL = (1<<31 - 1) * time.Second

func ttlOf(seconds uint32) time.Duration {
	if seconds > 1<<31-1 {
		return 0 // RFC 2181, section 8: "treat TTL values received with the most significant bit set as if the entire value received was zero"
	}
	return time.Duration(seconds) * time.Second
}

// follow goes along the CNAME records from a name to its records. end is where the chain ends.
func follow(answer []dns.RR, name string, qtype uint16) (list []dns.RR, end string, ttl time.Duration) {
	ttl = maxTTL
	for range maxChain {
		next := ""
		for _, rr := range answer {
			h := rr.Header()
			if !strings.EqualFold(h.Name, name) || h.Class != dns.ClassINET {
				continue
			}
			if h.Rrtype == qtype {
				list = append(list, rr)
				ttl = min(ttl, ttlOf(h.Ttl))
			} else if cname, ok := rr.(*dns.CNAME); ok && next == "" {
				next = cname.Target
				ttl = min(ttl, ttlOf(h.Ttl))
			}
		}
		if len(list) > 0 || next == "" {
			return list, name, ttl
		}
		name = next
	}
	return nil, name, ttl
}

// negativeTTL is how long an answer without records holds. RFC 2308, section 5: "the minimum of the MINIMUM field of the
// SOA record and the TTL of the SOA itself"; without that record it "SHOULD NOT be cached".
func negativeTTL(msg *dns.Msg) (ttl time.Duration, known bool) {
	for _, rr := range msg.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			return ttlOf(min(soa.Minttl, soa.Hdr.Ttl)), true
		}
	}
	return 0, false
}

// ask puts one question to the servers, beginning with the first, until one knows. What each said last is in the error.
func (c *dnsClient) ask(ctx context.Context, o *resolveOptions, first int, name string, qtype uint16) (*dns.Msg, error) {
	if _, ok := dns.IsDomainName(name); !ok {
		return nil, errors.New("that is not a domain name")
	}
	failures := make([]error, len(o.servers))
	for range o.attempts {
		for i := range o.servers {
			i = (first + i) % len(o.servers)
			server := o.servers[i]
			msg, err := c.exchange(ctx, server, o.timeout, name, qtype)
			if err == nil {
				return msg, nil
			}
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			failures[i] = fmt.Errorf("DNS server %s: %w", server.addr, err)
		}
	}
	failures = slices.DeleteFunc(failures, func(err error) bool { return err == nil })
	texts := make([]string, len(failures))
	for i, err := range failures {
		texts[i] = err.Error()
	}
	return nil, errors.New(strings.Join(texts, "; "))
}

// exchange asks one server. An error means that it does not know, and another may.
func (c *dnsClient) exchange(ctx context.Context, server dnsServer, timeout time.Duration, name string, qtype uint16) (*dns.Msg, error) {
	query := new(dns.Msg).SetQuestion(name, qtype)
	query.SetEdns0(udpSize, false)
	msg, err := c.send(ctx, server.network, server.addr, timeout, query)
	if err == nil && msg.Rcode == dns.RcodeFormatError {
		// RFC 6891, section 7: a responder that does not know EDNS says FORMERR; "the requestor MAY" ask without it.
		query.Extra = nil
		msg, err = c.send(ctx, server.network, server.addr, timeout, query)
	}
	if err == nil && msg.Truncated && server.network != "tcp" {
		msg, err = c.send(ctx, "tcp", server.addr, timeout, query)
	}
	if err != nil {
		return nil, err
	}
	_, hasSOA := negativeTTL(msg)
	switch {
	case msg.Rcode == dns.RcodeNameError:
		return msg, nil
	case msg.Rcode != dns.RcodeSuccess:
		return nil, fmt.Errorf("answered %s", dns.RcodeToString[msg.Rcode])
	case len(msg.Answer) == 0 && !hasSOA && !msg.Authoritative && !msg.RecursionAvailable:
		return nil, errors.New("answered with a referral; it is not a resolver")
	}
	return msg, nil
}

// send sends a query and waits for the answer to it.
func (c *dnsClient) send(ctx context.Context, network, addr string, timeout time.Duration, query *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	msg, err := c.roundTrip(ctx, network, addr, query)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("no answer within %v (%s)", timeout, network)
	case err != nil:
		return nil, err
	}
	return msg, nil
}

func (c *dnsClient) roundTrip(ctx context.Context, network, addr string, query *dns.Msg) (*dns.Msg, error) {
	raw, err := c.dialer.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	// Ends what waits when the time is over or nobody wants to know any more.
	defer context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })()

	conn := &dns.Conn{Conn: raw, UDPSize: udpSize}
	query.Id = dns.Id()
	if err := conn.WriteMsg(query); err != nil {
		return nil, err
	}
	for {
		msg, err := conn.ReadMsg()
		var netErr net.Error
		switch {
		case (err == nil || msg != nil && msg.Truncated) && answers(msg, query): // Some truncate in the middle of a record.
			return msg, nil
		case errors.As(err, &netErr), network == "tcp" && err != nil:
			return nil, err
		case network == "tcp":
			return nil, errors.New("answered another question")
		}
		// A datagram that cannot be read, or answers another question, may be anybody's. The right one may yet come.
	}
}

// answers tells whether msg is an answer to the query: RFC 5452, section 9.1.
func answers(msg, query *dns.Msg) bool {
	if !msg.Response || msg.Id != query.Id || msg.Opcode != query.Opcode {
		return false
	}
	if len(msg.Question) == 0 && msg.Rcode == dns.RcodeFormatError {
		return true // It could not even read the question.
	}
	if len(msg.Question) != 1 {
		return false
	}
	a, q := msg.Question[0], query.Question[0]
	return strings.EqualFold(a.Name, q.Name) && a.Qtype == q.Qtype && a.Qclass == q.Qclass
}
