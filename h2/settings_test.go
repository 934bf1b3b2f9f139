package h2

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// RFC 9113 section 6.5.3: settings are processed in the order in which they appear, so the last of several values counts, and
// one that is wrong in between is an error all the same.
func TestSettingsNamedAgain(t *testing.T) {
	windows := func(values ...uint32) (list []http2.Setting) {
		for _, v := range values {
			list = append(list, http2.Setting{ID: http2.SettingInitialWindowSize, Val: v})
		}
		return list
	}
	for _, tt := range []struct {
		values []uint32
		window int64 // of a stream that has sent 100 of 65,535 bytes and was given 50
		bad    bool
	}{
		{[]uint32{10, 20, 30}, -20, false},
		{[]uint32{1 << 20, 0}, -50, false},
		{[]uint32{0, 1 << 20, 65535}, 65485, false},
		{[]uint32{0, 1<<31 - 1, 65535}, 65485, false},
		{[]uint32{1<<31 - 1}, 1<<31 - 51, false},
		{[]uint32{1 << 31, 0}, 0, true},
		{[]uint32{0, 1 << 31, 65535}, 0, true},
	} {
		t.Run(fmt.Sprint(tt.values), func(t *testing.T) {
			c, p := clientAgainst(t, Config{}, wiretest.Options{HoldWindows: true})
			<-c.Ready()
			s := mustOpen(t, c, false, newRecorder(t))
			if n, err := s.TryWrite(make([]byte, 100), false); n != 100 || err != nil {
				t.Fatal(n, err)
			}
			c.Flush()
			p.ExpectOn(s.ID(), http2.FrameData)
			p.WriteWindowUpdate(s.ID(), 50)
			if tt.bad {
				p.WriteSettings(windows(tt.values...)...)
				expectGoAway(t, p, http2.ErrCodeFlowControl)
				return
			}
			p.WriteSettings(windows(tt.values...)...)
			p.ExpectSettingsAck()
			p.Barrier()
			c.mu.Lock()
			got, first := s.sendWin, c.peerInitWindow
			c.mu.Unlock()
			if want := tt.window; got != want {
				t.Errorf("the stream's window is %d, want %d", got, want)
			}
			if last := int64(tt.values[len(tt.values)-1]); first != last {
				t.Errorf("new streams get %d, want %d", first, last)
			}
		})
	}
	t.Run("overflow in between", func(t *testing.T) {
		c, p := clientAgainst(t, Config{}, wiretest.Options{HoldWindows: true})
		<-c.Ready()
		s := mustOpen(t, c, false, newRecorder(t))
		c.Flush()
		p.ExpectHeaders()
		p.WriteWindowUpdate(s.ID(), 1)
		p.WriteSettings(windows(0, 1<<31-1, 0)...) // 2^31 for a moment
		expectGoAway(t, p, http2.ErrCodeFlowControl)
	})
}

// Windows of streams change once for each SETTINGS frame, however often it names the initial window: a frame of 16 KiB can do so
// 2,730 times, and there may be hundreds of streams.
func TestSettingsCost(t *testing.T) {
	var list []byte
	for i := range protocolFrameSize / 6 {
		list = append(list, 0, byte(http2.SettingInitialWindowSize), 0, 0, 0, byte(i%2))
	}
	cost := func(streams int) time.Duration {
		c, _ := clientAgainst(t, Config{MaxPending: 1 << 20}, wiretest.Options{
			Settings: []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: 1000}},
		})
		<-c.Ready()
		for range streams {
			mustOpen(t, c, false, newRecorderOf(t, 1))
		}
		c.Flush()
		least := time.Hour
		for range 20 {
			c.mu.Lock()
			c.lim.settings.left = c.lim.settings.burst
			c.mu.Unlock()
			start := time.Now()
			if err := c.onSettings(frameHeader{length: len(list), t: http2.FrameSettings}, list); err != nil {
				t.Fatal(err)
			}
			least = min(least, time.Since(start))
		}
		return least
	}
	// Two hundred times as long, if each entry changed all windows.
	if one, many := cost(1), cost(250); many > 30*one {
		t.Errorf("%v with 250 streams, %v with one", many, one)
	}
}
