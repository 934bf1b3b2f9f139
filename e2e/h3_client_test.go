package e2e

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
)

// h3Client speaks gRPC over HTTP/3, by hand: grpc-go does not.
type h3Client struct {
	addr string
	tr   *http3.Transport
}

// dialH3 makes a client whose socket is bound to the loopback interface.
func dialH3(t *testing.T, addr string, cfg *tls.Config, qcfg *quic.Config) *h3Client {
	t.Helper()
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	qt := &quic.Transport{Conn: udp}
	c := &h3Client{addr: addr, tr: &http3.Transport{
		TLSClientConfig: cfg, QUICConfig: qcfg, DisableCompression: true,
		Dial: func(ctx context.Context, addr string, tlsCfg *tls.Config, cfg *quic.Config) (*quic.Conn, error) {
			to, err := net.ResolveUDPAddr("udp", addr)
			if err != nil {
				return nil, err
			}
			return qt.DialEarly(ctx, to, tlsCfg, cfg)
		},
	}}
	t.Cleanup(func() {
		_ = c.tr.Close()
		_ = qt.Close()
		_ = udp.Close()
	})
	return c
}

// h3Stream is one call.
type h3Stream struct {
	body   *io.PipeWriter
	answer chan struct{} // closed when resp or err is there
	resp   *http.Response
	err    error

	sendEnd chan error // what came of sending the request's body
	once    sync.Once
	status  error
}

// Open begins a call. As in grpc-go, metadata comes from the context and so does the deadline of withTimeout.
func (c *h3Client) Open(ctx context.Context, k kind) (stream, error) {
	r, w := io.Pipe()
	s := &h3Stream{body: w, answer: make(chan struct{}), sendEnd: make(chan error, 1)}
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteRequest: func(i httptrace.WroteRequestInfo) { s.sendEnd <- i.Err },
	})
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+c.addr+k.path(), r)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	req.Header.Set("User-Agent", "h3-test")
	md, _ := metadata.FromOutgoingContext(ctx)
	for name, values := range md {
		for _, v := range values {
			if strings.HasSuffix(name, "-bin") {
				v = base64.RawStdEncoding.EncodeToString([]byte(v))
			}
			req.Header.Add(name, v)
		}
	}
	context.AfterFunc(ctx, func() { _ = w.Close() }) // a body that nobody ends would keep its reader for ever
	go func() {
		defer close(s.answer)
		s.resp, s.err = c.tr.RoundTrip(req)
	}()
	return s, nil
}

func (s *h3Stream) Send(m proto.Message) error {
	raw, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	_, err = s.body.Write(append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(raw))), raw...))
	return err
}

func (s *h3Stream) CloseSend() error { return s.body.Close() }

func (s *h3Stream) Header() (metadata.MD, error) {
	<-s.answer
	if s.err != nil {
		return nil, s.err
	}
	if s.trailersOnly() {
		return nil, nil
	}
	return toMetadata(s.resp.Header)
}

func (s *h3Stream) trailersOnly() bool { return s.resp.Header.Get("Grpc-Status") != "" }

func (s *h3Stream) Trailer() metadata.MD {
	h := s.resp.Trailer
	if s.trailersOnly() {
		h = s.resp.Header
	}
	md, err := toMetadata(h)
	if err != nil {
		panic(err)
	}
	return md
}

func (s *h3Stream) Recv(m proto.Message) error {
	<-s.answer
	if s.err != nil {
		return s.err
	}
	var prefix [5]byte
	switch _, err := io.ReadFull(s.resp.Body, prefix[:]); err {
	case nil:
	case io.EOF:
		s.once.Do(s.readStatus)
		return s.status
	default:
		return fmt.Errorf("reading a message's prefix: %w", err)
	}
	if prefix[0] != 0 {
		return fmt.Errorf("flags %#x", prefix[0])
	}
	raw := make([]byte, binary.BigEndian.Uint32(prefix[1:]))
	if _, err := io.ReadFull(s.resp.Body, raw); err != nil {
		return fmt.Errorf("reading a message of %d bytes: %w", len(raw), err)
	}
	return proto.Unmarshal(raw, m)
}

// readStatus reads the end of the answer.
func (s *h3Stream) readStatus() {
	h := s.resp.Trailer
	if s.trailersOnly() {
		if h != nil {
			s.status = fmt.Errorf("a status in the header, but trailers too: %v", h)
			return
		}
		h = s.resp.Header
	}
	code, err := strconv.ParseUint(h.Get("Grpc-Status"), 10, 32)
	switch {
	case s.resp.StatusCode != http.StatusOK || s.resp.Header.Get("Content-Type") != "application/grpc":
		s.status = fmt.Errorf("HTTP status %d, header %v", s.resp.StatusCode, s.resp.Header)
	case err != nil:
		s.status = fmt.Errorf("the answer ended without a status: %w; trailers %v", err, h)
	case code == 0:
		s.status = io.EOF
	default:
		p := &statuspb.Status{Code: int32(code), Message: grpcwire.DecodeMessage(h.Get("Grpc-Message"))}
		if d := h.Get("Grpc-Status-Details-Bin"); d != "" {
			p = new(statuspb.Status)
			raw, err := base64.RawStdEncoding.DecodeString(d)
			if err == nil {
				err = proto.Unmarshal(raw, p)
			}
			if err == nil && (p.GetCode() != int32(code) || p.GetMessage() != grpcwire.DecodeMessage(h.Get("Grpc-Message"))) {
				err = fmt.Errorf("they say %v", p)
			}
			if err != nil {
				s.status = fmt.Errorf("grpc-status-details-bin: %w", err)
				return
			}
		}
		s.status = status.FromProto(p).Err()
		if codes.Code(code) != status.Code(s.status) {
			s.status = fmt.Errorf("status %d", code)
		}
	}
}

// toMetadata leaves out what is no metadata, as grpc-go does.
func toMetadata(h http.Header) (metadata.MD, error) {
	md := metadata.MD{}
	for name, values := range h {
		name = strings.ToLower(name)
		if name == "grpc-status" || name == "grpc-message" {
			continue
		}
		for _, v := range values {
			if strings.HasSuffix(name, "-bin") {
				raw, err := base64.RawStdEncoding.DecodeString(v)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", name, err)
				}
				v = string(raw)
			}
			md.Append(name, v)
		}
	}
	return md, nil
}
