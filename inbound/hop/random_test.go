package hop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"
	"time"
)

// TestRandom has many streams of one connection run at once, each with bytes of its own; some are given up, some aborted, some answered
// early.
func TestRandom(t *testing.T) {
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/early":
			_, _ = io.WriteString(w, "early")
		case "/abort":
			_, _ = io.CopyN(w, r.Body, 100)
			panic(http.ErrAbortHandler)
		default:
			serveBodies(w, r)
		}
	})
	c := r.client()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for i := range 16 {
		rnd := rand.New(rand.NewPCG(seed, uint64(i)))
		wg.Go(func() {
			for range 6 {
				if err := randomRequest(rnd, c, "http://"+r.addr); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// randomRequest makes a request and checks its answer.
func randomRequest(rnd *rand.Rand, c *http.Client, url string) error {
	size := []int{0, 1, 1000, 70_000, 300_000}[rnd.IntN(5)]
	if size > 0 {
		size = rnd.IntN(size) + 1
	}
	body := pattern(size, rnd.Uint32())
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var src io.Reader = &pieces{rnd: rand.New(rand.NewPCG(rnd.Uint64(), 0)), p: body}
	kind := rnd.IntN(8)
	switch kind {
	case 0: // given up on the way
		src = io.MultiReader(src, &giveUp{cancel})
	case 1:
		url += "/early"
	case 2:
		url += "/abort"
	case 3:
		return randomGet(rnd, c, url, size)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, src)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	var got []byte
	if err == nil {
		defer resp.Body.Close()
		got, err = readSlowly(rnd, resp.Body)
	}
	switch {
	case kind == 0:
		if err == nil && !errors.Is(ctx.Err(), context.Canceled) {
			return errors.New("a request that was given up has an answer")
		}
	case kind == 1:
		if err != nil || string(got) != "early" {
			return fmt.Errorf("early answer: %q, %w", got, err)
		}
	case kind == 2:
		if err == nil {
			return errors.New("an aborted answer is whole")
		}
	case err != nil || !bytes.Equal(got, body) || resp.Trailer.Get("X-Sum") != sum(body):
		return fmt.Errorf("%d bytes of %d, equal: %v, trailers %v: %w", len(got), size, bytes.Equal(got, body), resp.Trailer, err)
	}
	return nil
}

func randomGet(rnd *rand.Rand, c *http.Client, url string, size int) error {
	resp, err := c.Get(fmt.Sprintf("%s/?n=%d", url, size))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got, err := readSlowly(rnd, resp.Body)
	if err != nil || !bytes.Equal(got, pattern(size, uint32(size))) {
		return fmt.Errorf("GET of %d: %d bytes, %w", size, len(got), err)
	}
	return nil
}

// pieces is a body that comes in pieces.
type pieces struct {
	rnd *rand.Rand
	p   []byte
}

func (r *pieces) Read(p []byte) (int, error) {
	if len(r.p) == 0 {
		return 0, io.EOF
	}
	if r.rnd.IntN(4) == 0 {
		time.Sleep(time.Duration(r.rnd.IntN(500)) * time.Microsecond)
	}
	n := copy(p[:min(len(p), r.rnd.IntN(20_000)+1)], r.p)
	r.p = r.p[n:]
	return n, nil
}

// giveUp is the end of a body that is not to be.
type giveUp struct{ cancel func() }

func (g *giveUp) Read([]byte) (int, error) {
	g.cancel()
	return 0, errors.New("given up")
}

// readSlowly reads all, with pauses.
func readSlowly(rnd *rand.Rand, r io.Reader) ([]byte, error) {
	var got []byte
	for p := make([]byte, 20_000); ; {
		if rnd.IntN(4) == 0 {
			time.Sleep(time.Duration(rnd.IntN(500)) * time.Microsecond)
		}
		n, err := r.Read(p[:rnd.IntN(len(p))+1])
		got = append(got, p[:n]...)
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return got, err
		}
	}
}
