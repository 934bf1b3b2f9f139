package grpcwire

import (
	"encoding/base64"
	"fmt"
)

// EncodeBin encodes the value of a metadata key that ends in -bin. PROTOCOL-HTTP2: "Implementations MUST accept
// padded and un-padded values and should emit un-padded values."
func EncodeBin(b []byte) string { return base64.RawStdEncoding.EncodeToString(b) }

// AppendBin appends what EncodeBin returns.
func AppendBin(dst, b []byte) []byte { return base64.RawStdEncoding.AppendEncode(dst, b) }

// DecodeBin decodes one value of a metadata key that ends in -bin, padded or not. A field may hold several, joined by
// commas; they must be split before. PROTOCOL-HTTP2: "Duplicate header names may have their values joined with "," as
// the delimiter and be considered semantically equivalent. Implementations must split Binary-Headers on "," before
// decoding the Base64-encoded values."
func DecodeBin(v string) ([]byte, error) {
	enc := base64.RawStdEncoding
	if n := len(v); n > 0 && n%4 == 0 && v[n-1] == '=' {
		enc = base64.StdEncoding
	}
	b, err := enc.DecodeString(v)
	if err != nil {
		return nil, fmt.Errorf("decoding binary metadata: %w", err)
	}
	return b, nil
}
