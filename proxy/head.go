package proxy

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

// The header block of an attempt: gRPC over HTTP/2, "Requests → Request-Headers", "Request-Headers → Call-Definition
// *Custom-Metadata". All of it is legal, whatever the client sent: a server may close the connection for what is not, with
// everybody's calls on it. The same call has the same block each time, so that a fault that hangs on the order can be found.
//
// It is made in several small functions since a server's goroutine has come far when it gets here: with one large frame more its
// stack would have to grow for each call.

// callFields are the fields of gRPC's Call-Definition that the proxy passes on as they are, in the order of gRPC over HTTP/2,
// "Requests". They stand before the metadata.
var callFields = [...]string{"grpc-message-type", "grpc-encoding", "grpc-accept-encoding", "user-agent"}

// ofCall tells the fields that stand in front already.
func ofCall(name string) bool {
	switch name {
	case "content-type", "grpc-timeout", "grpc-message-type", "grpc-encoding", "grpc-accept-encoding", "user-agent":
		return true
	}
	return false
}

// HopByHop tells names that concern one connection only and never travel on (RFC 9110 section 7.6.1, and those that
// reverse_proxy takes away), as well as those that are set anew for the next hop.
func HopByHop(name string) bool {
	switch name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "alt-svc",
		"proxy-authenticate", "proxy-authorization", "content-length", "host", "http2-settings", "expect":
		return true
	}
	return false
}

// makeHead builds the attempt's header block.
func (f *Flight) makeHead(a *attempt) {
	fields, authority := f.Request.Fields, f.Call.Authority
	if r := f.p.cfg.Rules; r != nil {
		fields, authority = r.Request(&f.Call, fields, authority)
	}
	if !validAuthority(authority) {
		authority = f.choice.view.Snapshot.At(a.pick.Index).Authority()
	}
	a.head = GetFields()
	head := f.appendCall((*a.head)[:0], a, fields, authority)
	head = appendCallFields(head, fields)
	*a.head = appendMetadata(head, fields)
}

func (f *Flight) dropHead(a *attempt) {
	if a.head != nil {
		PutFields(a.head)
		a.head = nil
	}
}

// callHead is how many fields every call has.
const callHead = 6

// appendCall appends what every call has, in place: so many fields on the stack would make it grow.
func (f *Flight) appendCall(head []h2.Field, a *attempt, fields []h2.Field, authority string) []h2.Field {
	head = slices.Grow(head[:0], callHead+1)[:callHead]
	head[0] = h2.Field{Name: ":method", Value: "POST"}
	head[1] = h2.Field{Name: ":scheme", Value: a.end.Scheme()}
	head[2] = h2.Field{Name: ":path", Value: f.Request.Path}
	head[3] = h2.Field{Name: ":authority", Value: authority}
	// "te: trailers" detects incompatible proxies; gRPC requires it.
	head[4] = h2.Field{Name: "te", Value: "trailers"}
	v, ok := field(fields, "content-type")
	if !ok { // rules may have taken it away
		v = f.contentType
	}
	head[5] = h2.Field{Name: "content-type", Value: v}
	if !f.Call.Deadline.IsZero() {
		head = append(head, h2.Field{Name: "grpc-timeout"}) // Head fills it in
	}
	return head
}

func appendCallFields(head, fields []h2.Field) []h2.Field {
	for _, name := range callFields {
		for i := range fields {
			if fields[i].Name == name {
				head = append(head, fields[i])
			}
		}
	}
	return head
}

// appendMetadata appends all the rest.
func appendMetadata(head, fields []h2.Field) []h2.Field {
	for i := range fields {
		if name := fields[i].Name; !ofCall(name) && !HopByHop(name) && name != "" && name[0] != ':' {
			head = append(head, fields[i])
		}
	}
	return head
}

// tooLarge refuses metadata beyond the configured limits.
func (f *Flight) tooLarge(fields []h2.Field) *Failure {
	cfg := &f.p.cfg
	var text string
	if most := cfg.MaxMetadataBytes; most > 0 {
		if n := metadataBytes(fields); int64(n) > most {
			text = fmt.Sprintf("%d bytes, and max_metadata_bytes is %d", n, most)
		}
	}
	if most := cfg.MaxMetadataFields; most > 0 && len(fields) > most {
		text = fmt.Sprintf("%d fields, and max_metadata_fields is %d", len(fields), most)
	}
	if text == "" {
		return nil
	}
	return Fail(grpcwire.ResourceExhausted, ReasonRequestSize, "the call's metadata is larger than the proxy passes on: "+text)
}

// responseHead appends an upstream's head for the client: :status, and all that travels on. Where it does not end its stream, a status
// in it does not count, and a client that reads it all the same must not take it for the call's.
func responseHead(head, fields []h2.Field, end bool) []h2.Field {
	head = append(head, statusField)
	for i := range fields {
		name := fields[i].Name
		if name == "" || name[0] == ':' || HopByHop(name) || !end && isStatusField(name) {
			continue
		}
		head = append(head, fields[i])
	}
	return head
}

// statusField: gRPC over HTTP/2: the HTTP status of a gRPC answer is 200.
var statusField = h2.Field{Name: ":status", Value: "200"}

// trailerFields appends an upstream's trailers for the client.
func trailerFields(out, fields []h2.Field) []h2.Field {
	for i := range fields {
		if name := fields[i].Name; name != "" && name[0] != ':' && !HopByHop(name) {
			out = append(out, fields[i])
		}
	}
	return out
}

// refusal is an answer that the proxy makes.
func (f *Flight) refusal(why *Failure) []h2.Field {
	return why.appendTo([]h2.Field{statusField, f.answerType()}, f.Call.Result.Attempts, f.p.cfg.ExposeUpstream)
}

// answerType is the content-type of an answer that the proxy makes: the request's. A client that speaks
// application/grpc+json takes application/grpc for the answer of something else, whatever the status (connect-go, say).
func (f *Flight) answerType() h2.Field {
	v := f.contentType
	if v == "" {
		v = "application/grpc"
	}
	return h2.Field{Name: "content-type", Value: v}
}

// maxQuoted is how much of a path goes into a message.
const maxQuoted = 200

func badPath(path string) string {
	return fmt.Sprintf("the path is not /Service/Method: %.*q", maxQuoted, path)
}

// validAuthority tells what :authority can say (RFC 9113 section 8.3.1: host and port, without userinfo; RFC 3986 section 3.2)
// from what servers take for a malformed request.
func validAuthority(s string) bool {
	host, port, more := strings.Cut(s, ":")
	colons := false
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']')
		if end < 0 || end+1 < len(s) && s[end+1] != ':' {
			return false
		}
		host, colons = s[1:end], true
		_, port, more = strings.Cut(s[end:], ":")
	}
	for i := range len(host) {
		switch c := host[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte("-._~!$&'()*+,;=%", c) >= 0, colons && c == ':':
		default:
			return false
		}
	}
	if more && strings.Trim(port, "0123456789") != "" {
		return false
	}
	return host != ""
}

// field is the value of the first field of the name.
func field(fields []h2.Field, name string) (string, bool) {
	for i := range fields {
		if fields[i].Name == name {
			return fields[i].Value, true
		}
	}
	return "", false
}

// metadataBytes is the size of a header block as RFC 9113 section 6.5.2 counts it.
func metadataBytes(fields []h2.Field) int {
	n := 0
	for i := range fields {
		n += len(fields[i].Name) + len(fields[i].Value) + 32
	}
	return n
}

// fieldLists are scratch space for building header blocks.
var fieldLists = sync.Pool{New: func() any { l := make([]h2.Field, 0, 32); return &l }}

// GetFields returns an empty list of fields, which PutFields gives back: most header blocks then cost no memory.
func GetFields() *[]h2.Field { return fieldLists.Get().(*[]h2.Field) }

// PutFields gives a list back that GetFields has returned, or does nothing with one that has become too large to be kept.
func PutFields(l *[]h2.Field) {
	if cap(*l) <= 256 {
		clear(*l) // do not keep callers' strings alive
		*l = (*l)[:0]
		fieldLists.Put(l)
	}
}
