package h2

import (
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// An upstream has many calls on its connection, and they go on, whatever habits it has, as long as those cost next to nothing.
func TestPatienceWithServers(t *testing.T) {
	t.Run("no acknowledgement of SETTINGS", func(t *testing.T) {
		c, p := clientAgainst(t, Config{SettingsTimeout: 20 * time.Millisecond}, wiretest.Options{NoSettingsAck: true})
		<-c.Ready()
		until(t, "the timer has come and gone", func() bool { return timerAt(c) == 0 })
		r := newRecorder(t)
		s := mustOpen(t, c, true, r)
		c.Flush()
		p.ExpectHeaders()
		p.WriteHeaders(s.ID(), wiretest.Head("grpc-status", "0"), true)
		r.want("head :status=200 content-type=application/grpc grpc-status=0 true")
		p.WriteSettingsAck()
		until(t, "acknowledged", func() bool { return c.Stats().SettingsAcked })
	})
	t.Run("SETTINGS behind an answer", func(t *testing.T) {
		c, p := clientAgainst(t, Config{}, wiretest.Options{NoSettings: true, NoSettingsAck: true})
		r := newRecorder(t)
		gone, s := mustOpen(t, c, true, newRecorder(t)), mustOpen(t, c, true, r)
		c.Flush()
		p.ExpectHeaders()
		p.ExpectHeaders()
		gone.Reset(Cancel)
		c.Flush()
		p.ExpectReset(gone.ID())
		p.WriteHeadersSplit(gone.ID(), wiretest.Head("x", "0123456789"), false, 10)
		p.WriteHeaders(s.ID(), wiretest.Head(), false)
		p.WriteData(s.ID(), []byte("abc"), false)
		r.want("head :status=200 content-type=application/grpc false")
		r.want("data 3 false")
		if st := c.Stats(); st.PeerSettings || c.Err() != nil {
			t.Error(c.Err(), st)
		}
		p.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 7})
		wait(t, c.Ready())
		p.WriteHeaders(s.ID(), wiretest.Fields("grpc-status", "0"), true)
		r.want("trailers grpc-status=0")
		if n := c.Available(); n != 7 {
			t.Error(n)
		}
	})
	t.Run("a stranger's HEADERS before SETTINGS", func(t *testing.T) {
		c, p := clientAgainst(t, Config{}, wiretest.Options{NoSettings: true, NoSettingsAck: true})
		mustOpen(t, c, true, newRecorder(t))
		p.WriteHeaders(3, wiretest.Head(), false) // there is no such call
		wait(t, c.Done())
		if e := c.Err(); e.Kind != KindNotHTTP2 {
			t.Error(e)
		}
	})
	t.Run("still no SETTINGS", func(t *testing.T) {
		c, p := clientAgainst(t, Config{SettingsTimeout: 50 * time.Millisecond}, wiretest.Options{NoSettings: true, NoSettingsAck: true})
		s := mustOpen(t, c, true, newRecorder(t))
		c.Flush()
		p.ExpectHeaders()
		p.WriteHeaders(s.ID(), wiretest.Head(), false)
		wait(t, c.Done())
		if e := c.Err(); e.Kind != KindTimeout || e.Code != SettingsTimeout {
			t.Error(e)
		}
	})

	// What is too much ends the stream that it belongs to, if there is one.
	for name, tt := range map[string]struct {
		frame  func(p *wiretest.Conn, id uint32)
		fine   int
		burst  func(*limits) *bucket
		stream bool
	}{
		"empty DATA": {
			func(p *wiretest.Conn, id uint32) { p.WriteData(id, nil, false) }, 10000,
			func(l *limits) *bucket { return &l.emptyData }, true,
		},
		"WINDOW_UPDATE": {
			func(p *wiretest.Conn, id uint32) { p.WriteWindowUpdate(id, 1) }, 10000,
			func(l *limits) *bucket { return &l.windowUpdates }, true,
		},
		"informational": {
			func(p *wiretest.Conn, id uint32) { p.WriteHeaders(id, wiretest.Fields(":status", "100"), false) }, 500,
			func(l *limits) *bucket { return &l.informational }, true,
		},
		"PING": {
			func(p *wiretest.Conn, _ uint32) { p.WritePing(false, [8]byte{1}) }, 10000,
			func(l *limits) *bucket { return &l.pings }, false,
		},
		"SETTINGS": {
			func(p *wiretest.Conn, _ uint32) { p.WriteSettings() }, 500,
			func(l *limits) *bucket { return &l.settings }, false,
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, p := clientAgainst(t, Config{})
			<-c.Ready()
			r, other := newRecorderOf(t, tt.fine+10), newRecorder(t)
			s, o := mustOpen(t, c, false, r), mustOpen(t, c, false, other)
			c.Flush()
			p.ExpectHeaders()
			p.ExpectHeaders()
			if name != "informational" {
				p.WriteHeaders(s.ID(), wiretest.Head(), false)
				r.want("head :status=200 content-type=application/grpc false")
			}
			p.Batch(func() {
				for range tt.fine {
					tt.frame(p, s.ID())
				}
			})
			p.Barrier()
			if c.Err() != nil || s.Closed() {
				t.Fatal(c.Err(), s.Err())
			}
			c.mu.Lock()
			b := tt.burst(&c.lim)
			b.left, b.at, b.rate = 0, c.nano(), 0
			c.mu.Unlock()
			for range 10 {
				tt.frame(p, s.ID())
			}
			if !tt.stream {
				expectGoAway(t, p, http2.ErrCodeEnhanceYourCalm)
				wait(t, c.Done())
				return
			}
			if code := p.ExpectReset(s.ID()); code != http2.ErrCodeEnhanceYourCalm {
				t.Error(code)
			}
			until(t, "the stream's end", s.Closed)
			if e := s.Err(); e.Kind != KindProtocol || e.Code != EnhanceYourCalm || e.Connection {
				t.Errorf("%+v", e)
			}
			p.WriteHeaders(o.ID(), wiretest.Head(), false)
			other.want("head :status=200 content-type=application/grpc false")
		})
	}
}

// An answer whose metadata are far too large ends its stream and no other: clients can make a service answer so.
func TestHugeHeaderBlockOfServer(t *testing.T) {
	c, p := clientAgainst(t, Config{MaxHeaderListSize: 4 << 10})
	<-c.Ready()
	r, late, other := newRecorder(t), newRecorder(t), newRecorder(t)
	s, l, o := mustOpen(t, c, false, r), mustOpen(t, c, false, late), mustOpen(t, c, false, other)
	c.Flush()
	for range 3 {
		p.ExpectHeaders()
	}
	huge := wiretest.Head("x-new", "1")
	for range 10 {
		huge = append(huge, hpack.HeaderField{Name: "x-huge", Value: strings.Repeat("\x01", 10<<10), Sensitive: true})
	}
	huge = append(huge, hpack.HeaderField{Name: "x-last", Value: "2"})
	p.WriteHeadersSplit(s.ID(), huge, false, 10000)
	r.want("reset header_list_size CANCEL remote=false unprocessed=false")
	if code := p.ExpectReset(s.ID()); code != http2.ErrCodeCancel {
		t.Error(code)
	}
	l.Reset(Cancel) // it comes after its stream has ended
	c.Flush()
	p.ExpectReset(l.ID())
	p.WriteHeadersSplit(l.ID(), huge, false, 10000)
	// The table of fields is in step: these are indexed by now.
	p.WriteHeaders(o.ID(), wiretest.Head("x-new", "1", "x-last", "2"), false)
	other.want("head :status=200 content-type=application/grpc x-new=1 x-last=2 false")
	late.none()
	if st := c.Stats(); st.OversizedHeaders != 2 || c.Err() != nil {
		t.Errorf("%v %+v", c.Err(), st)
	}
	for range 20 {
		huge = append(huge, huge[3])
	}
	p.WriteHeadersSplit(o.ID(), huge, false, 10000)
	expectGoAway(t, p, http2.ErrCodeEnhanceYourCalm)
	other.want("reset header_list_size CANCEL remote=false unprocessed=false")
}
