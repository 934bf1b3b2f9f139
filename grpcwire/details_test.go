package grpcwire

import (
	"maps"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

var detailCases = []struct {
	name    string
	code    Code
	message string
	info    *ErrorInfo
}{
	{"nothing", OK, "", nil},
	{"code", Internal, "", nil},
	{"code and message", Unavailable, "Größe überschritten", nil},
	{"empty info", Unavailable, "x", &ErrorInfo{}},
	{"info", Unavailable, "no upstream", &ErrorInfo{Reason: "NO_UPSTREAM", Domain: "grpc_proxy"}},
	{"metadata", ResourceExhausted, "m", &ErrorInfo{
		Reason: "R", Domain: "D",
		Metadata: [][2]string{{"attempts", "3"}, {"upstream", "10.0.0.1:50051"}, {"empty", ""}, {"", "no key"}},
	}},
	{"long", Unknown, string(make([]byte, 300)), &ErrorInfo{Metadata: [][2]string{{"k", string(make([]byte, 200))}}}},
	{"code not assigned", 99, "m", nil},
	{"code beyond int32", 1<<32 - 1, "m", nil},
}

func TestAppendStatusDetails(t *testing.T) {
	for _, tt := range detailCases {
		t.Run(tt.name, func(t *testing.T) {
			want := &spb.Status{Code: int32(tt.code), Message: tt.message}
			if tt.info != nil {
				info := &errdetails.ErrorInfo{Reason: tt.info.Reason, Domain: tt.info.Domain}
				for _, kv := range tt.info.Metadata {
					if info.Metadata == nil {
						info.Metadata = make(map[string]string)
					}
					info.Metadata[kv[0]] = kv[1]
				}
				detail, err := anypb.New(info)
				if err != nil {
					t.Fatal(err)
				}
				want.Details = []*anypb.Any{detail}
			}
			b := AppendStatusDetails([]byte("x"), tt.code, tt.message, tt.info)
			got := new(spb.Status)
			if err := proto.Unmarshal(b[1:], got); err != nil {
				t.Fatalf("%x: %v", b, err)
			}
			if b[0] != 'x' || got.Code != want.Code || got.Message != want.Message || len(got.Details) != len(want.Details) {
				t.Fatalf("got %v, want %v", got, want)
			}
			if tt.info == nil {
				return
			}
			if got.Details[0].TypeUrl != want.Details[0].TypeUrl {
				t.Errorf("type %q, want %q", got.Details[0].TypeUrl, want.Details[0].TypeUrl)
			}
			// As a grpc-go client sees it.
			info, ok := status.FromProto(got).Details()[0].(*errdetails.ErrorInfo)
			if !ok {
				t.Fatalf("detail is %T", status.FromProto(got).Details()[0])
			}
			wantInfo := new(errdetails.ErrorInfo)
			if err := want.Details[0].UnmarshalTo(wantInfo); err != nil {
				t.Fatal(err)
			}
			if info.Reason != wantInfo.Reason || info.Domain != wantInfo.Domain || !maps.Equal(info.Metadata, wantInfo.Metadata) {
				t.Errorf("got %v, want %v", info, wantInfo)
			}
		})
	}
}

// A string that is not UTF-8 must not make the whole message unreadable.
func TestAppendStatusDetailsNotUTF8(t *testing.T) {
	b := AppendStatusDetails(nil, Internal, "a\xffb", &ErrorInfo{
		Reason: "\xff", Domain: "d\xfe", Metadata: [][2]string{{"k\xff", "v\xff\xff"}},
	})
	st := new(spb.Status)
	if err := proto.Unmarshal(b, st); err != nil {
		t.Fatal(err)
	}
	info := new(errdetails.ErrorInfo)
	if err := st.Details[0].UnmarshalTo(info); err != nil {
		t.Fatal(err)
	}
	if st.Message != "a\uFFFDb" || info.Reason != "\uFFFD" || info.Domain != "d\uFFFD" || info.Metadata["k\uFFFD"] != "v\uFFFD" {
		t.Errorf("got %v, %v", st, info)
	}
}

func BenchmarkAppendStatusDetails(b *testing.B) {
	info := &ErrorInfo{Reason: "UPSTREAM_CONNECT_FAILED", Domain: "grpc_proxy", Metadata: [][2]string{{"attempts", "3"}}}
	b.ReportAllocs()
	buf := make([]byte, 0, 512)
	for b.Loop() {
		buf = AppendStatusDetails(buf[:0], Unavailable, "connecting to the upstream: connection refused", info)
	}
}
