package e2e

import (
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// TestExitStalledReader: a client whose window has no room even for a small answer, which is complete, cannot keep Caddy
// from exiting.
func TestExitStalledReader(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	b := backendtest.Start(t, backendtest.Options{})
	cmd, addr, _ := startCaddy(t, "", "grpc_proxy "+b.Addr()+" {\n\texit_timeout 700ms\n}")
	probe := client(t, addr)
	eventually(t, "Caddy serves", func() bool {
		_, err := probe.EmptyCall(t.Context(), &testgrpc.Empty{})
		return err == nil
	})
	c := wiretest.Dial(t, addr, nil, wiretest.Options{
		HoldWindows: true, Settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 0}},
	})
	id := c.Open(wiretest.Request(addr, "/grpc.testing.TestService/UnaryCall"), false)
	c.WriteData(id, []byte{0, 0, 0, 0, 3, 0x10, 0xe8, 0x07}, true) // 1,000 bytes are asked for
	c.ExpectOn(id, http2.FrameHeaders)
	start := time.Now()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	left := make(chan error, 1)
	go func() { left <- cmd.Wait() }()
	select {
	case err := <-left:
		t.Logf("the process was gone after %v", time.Since(start))
		if err != nil {
			t.Error(err)
		}
	case <-time.After(timeout):
		t.Error("Caddy does not exit")
		_ = cmd.Process.Kill()
		<-left
	}
}
