package grpcwire

import (
	"testing"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
)

// FuzzHealthRequest: what protobuf reads, we read the same; what it refuses, we refuse.
func FuzzHealthRequest(f *testing.F) {
	for _, service := range []string{"", "pkg.Service", "Größe"} {
		b, err := proto.Marshal(&healthpb.HealthCheckRequest{Service: service})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{0x0a, 0x01, 0xff})                             // not UTF-8
	f.Add([]byte{0x0a, 0x02, 'a'})                              // cut short
	f.Add([]byte{0x08, 0x01, 0x0a, 0x01, 'a', 0x0a, 0x01, 'b'}) // another type, and the field twice
	f.Add([]byte{0x0b, 0x0c})                                   // a group
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := ParseHealthRequest(b)
		m := new(healthpb.HealthCheckRequest)
		if want := proto.Unmarshal(b, m); (err == nil) != (want == nil) || err == nil && got != m.GetService() {
			t.Errorf("%x: %q, %v; protobuf reads %q, %v", b, got, err, m.GetService(), want)
		}
	})
}

// What we write, protobuf reads.
func TestHealthResponses(t *testing.T) {
	want := new(healthpb.HealthListResponse)
	want.Statuses = make(map[string]*healthpb.HealthCheckResponse)
	var list []byte
	for number, name := range healthpb.HealthCheckResponse_ServingStatus_name {
		m := new(healthpb.HealthCheckResponse)
		if err := proto.Unmarshal(AppendHealthResponse(nil, ServingStatus(number)), m); err != nil || int32(m.GetStatus()) != number {
			t.Errorf("%s: read as %v, %v", name, m, err)
		}
		want.Statuses["pkg."+name] = m
		list = AppendHealthListEntry(list, "pkg."+name, ServingStatus(number))
	}
	want.Statuses[""] = &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}
	list = AppendHealthListEntry(list, "", Serving)
	got := new(healthpb.HealthListResponse)
	if err := proto.Unmarshal(list, got); err != nil || !proto.Equal(got, want) {
		t.Errorf("read as %v, %v; want %v", got, err, want)
	}
}
