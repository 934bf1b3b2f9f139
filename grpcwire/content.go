package grpcwire

import "strings"

// Kind says which of the gRPC protocols a content-type names.
type Kind uint8

const (
	// NotGRPC: something else, or no content-type.
	NotGRPC Kind = iota
	// GRPC: gRPC over HTTP/2, application/grpc.
	GRPC
	// GRPCWeb: gRPC-Web with binary framing, application/grpc-web.
	GRPCWeb
	// GRPCWebText: gRPC-Web in base64, application/grpc-web-text.
	GRPCWebText
)

// String returns other, grpc, grpc-web or grpc-web-text.
func (k Kind) String() string {
	switch k {
	case GRPC:
		return "grpc"
	case GRPCWeb:
		return "grpc-web"
	case GRPCWebText:
		return "grpc-web-text"
	}
	return "other"
}

const contentTypeGRPC = "application/grpc"

// ContentKind tells gRPC from gRPC-Web and from everything else. A type counts as named if it stands alone or is
// followed at once by + (a format such as +proto) or ; (parameters), in upper or lower case.
//
// PROTOCOL-HTTP2: "Content-Type → "content-type" "application/grpc" [("+proto" / "+json" / {custom})]"; the semicolon
// is what gRPC libraries accept besides. Media types are case-insensitive (RFC 9110 section 8.3.1).
func ContentKind(contentType string) Kind {
	const n = len(contentTypeGRPC)
	if len(contentType) < n || !strings.EqualFold(contentType[:n], contentTypeGRPC) {
		return NotGRPC
	}
	rest := contentType[n:]
	if ends(rest) {
		return GRPC
	}
	if rest, ok := cutPrefixFold(rest, "-web"); ok {
		if ends(rest) {
			return GRPCWeb
		}
		if rest, ok = cutPrefixFold(rest, "-text"); ok && ends(rest) {
			return GRPCWebText
		}
	}
	return NotGRPC
}

// ends tells whether a media type is complete before rest.
func ends(rest string) bool { return rest == "" || rest[0] == '+' || rest[0] == ';' }

func cutPrefixFold(s, prefix string) (after string, ok bool) {
	if len(s) < len(prefix) || !strings.EqualFold(s[:len(prefix)], prefix) {
		return s, false
	}
	return s[len(prefix):], true
}

// SplitMethod splits the :path of a call, "/{service}/{method}", at its last slash: a service may contain slashes,
// a method does not (as in grpc-go). Slashes at the ends of the service do not belong to it, so that //pkg.Service/Method,
// which servers may take for the same method, is the same here. It is false if the path has no second slash; what stands
// around it may be empty.
//
// PROTOCOL-HTTP2: "Path → ":path" "/" Service-Name "/" {method name}".
func SplitMethod(path string) (service, method string, ok bool) {
	i := strings.LastIndexByte(path, '/')
	if i < 1 || path[0] != '/' {
		return "", "", false
	}
	return strings.Trim(path[1:i], "/"), path[i+1:], true
}
