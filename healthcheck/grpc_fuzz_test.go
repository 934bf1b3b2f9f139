package healthcheck

import (
	"testing"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
)

// FuzzVerdict: what protobuf reads, we read alike; what it does not, is no answer.
func FuzzVerdict(f *testing.F) {
	for _, st := range []healthpb.HealthCheckResponse_ServingStatus{0, 1, 2, 3, 99, -1} {
		b, err := proto.Marshal(&healthpb.HealthCheckResponse{Status: st})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{0x08})
	f.Add([]byte{0x0a, 0x01, 0x01, 0x08, 0x01})
	f.Add([]byte{0x08, 0x81, 0x80, 0x80, 0x80, 0x10})
	f.Add([]byte{0xbd, 0xbd, 0xbd, 0xa6, 0x30, 0x30, 0x30, 0x30, 0x30}) // a field number that is too large
	f.Fuzz(func(t *testing.T, b []byte) {
		v := new(GRPC).verdict(new(Target), b)
		m := new(healthpb.HealthCheckResponse)
		if err := proto.Unmarshal(b, m); err != nil {
			if v.Answer != NoAnswer {
				t.Errorf("%x: %+v, but protobuf says %v", b, v, err)
			}
			return
		}
		want := NotServing
		if m.Status == isServing {
			want = Serving
		}
		if v.Answer != want {
			t.Errorf("%x: %+v, want %v by %v", b, v, want, m.Status)
		}
	})
}

// FuzzRequest: protobuf reads what we write.
func FuzzRequest(f *testing.F) {
	f.Add("")
	f.Add("pkg.Service")
	f.Fuzz(func(t *testing.T, service string) {
		m := new(healthpb.HealthCheckRequest)
		if err := proto.Unmarshal(request(service), m); err == nil && m.Service != service {
			t.Errorf("%q reads %q", service, m.Service)
		}
	})
}
