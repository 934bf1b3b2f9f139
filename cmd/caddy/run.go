package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"
)

const (
	// redraw is the time between two looks at the figures: a fluid table, or one line a second.
	redraw      = 250 * time.Millisecond
	redrawPlain = time.Second
	// removeTimeout bounds the removal of the temporary directory, which has to be gone for as long as settle.
	removeTimeout = 400 * time.Millisecond
	settle        = 30 * time.Millisecond
)

// demo is all that runs: backends, Caddy and the client.
type demo struct {
	options options
	site    site
	stats   *stats
	proxy   *proxy
	client  *client
	begin   time.Time // of the first call
}

// run runs the demo until ctx ends, o.duration is over or nobody reads what it shows. All it started is gone when it
// returns, and every file it made.
func run(ctx context.Context, o options, out *screen) error {
	d := &demo{options: o}
	text, err := d.start(ctx)
	if err != nil {
		_, stopErr := d.stop() //nolint:contextcheck // ctx may have ended, stopping takes its time all the same
		if ctx.Err() != nil {
			return stopErr // stopped by the user before it had begun
		}
		return errors.Join(err, stopErr)
	}
	out.print(introduction(o, d.site, text)...)
	d.show(ctx, out)

	last, stopping := d.look(), time.Now()
	elapsed := last.elapsed
	last, err = d.stop() //nolint:contextcheck // as above
	last.elapsed = elapsed
	out.print(summary(d.site, last, time.Since(stopping), err)...)
	if out.err != nil && !errors.Is(out.err, syscall.EPIPE) {
		err = errors.Join(err, fmt.Errorf("writing to standard output: %w", out.err))
	}
	return err
}

// start starts everything and returns the Caddyfile that Caddy runs. After an error stop takes back what it started.
func (d *demo) start(ctx context.Context) ([]byte, error) {
	tlsPort, err := reservePort(d.options.tlsPort, "tls-port")
	if err != nil {
		return nil, err
	}
	defer tlsPort.Close()
	h2cPort, err := reservePort(d.options.h2cPort, "h2c-port")
	if err != nil {
		return nil, err
	}
	defer h2cPort.Close()

	d.site = site{TLSPort: portOf(tlsPort), H2CPort: portOf(h2cPort), Policy: d.options.policy}
	if d.site.Dir, err = os.MkdirTemp("", "grpc-demo-"); err != nil {
		return nil, fmt.Errorf("making a temporary directory: %w", err)
	}
	if d.site.Backends, err = startBackends(d.options.backends, d.options.slow); err != nil {
		return nil, err
	}
	text, config, err := caddyfileOf(d.site)
	if err != nil {
		return nil, err
	}
	// Now the ports are Caddy's. Closing cannot fail in a way that matters: listening on them would.
	_, _ = tlsPort.Close(), h2cPort.Close()
	if d.proxy, err = startProxy(config, d.site.Dir); err != nil {
		return nil, err
	}
	roots, err := d.proxy.roots()
	if err != nil {
		return nil, err
	}
	if err := d.proxy.ready(ctx, d.site.TLSPort, roots); err != nil {
		return nil, err
	}
	d.stats = newStats(d.site.Backends)
	client, err := newClient(d.site.TLSPort, roots, d.stats)
	if err != nil {
		return nil, err
	}
	d.client, d.begin = client, time.Now()
	go client.send(d.options.rate) //nolint:contextcheck // it goes on until stop, not until ctx ends
	return text, nil
}

// stop stops the client, the backends and Caddy, in this order, and removes their files; in less than 2 s, whatever
// is still going on. It returns the final figures. Calls of other clients that are still open end with UNAVAILABLE,
// since their backends go before the proxy does.
func (d *demo) stop() (view, error) {
	if d.client != nil {
		d.client.stop()
	}
	stopBackends(d.site.Backends)
	var err error
	if d.proxy != nil {
		err = d.proxy.stop()
	}
	var last view
	if d.client != nil {
		last = d.look()
	}
	if d.site.Dir != "" {
		err = errors.Join(err, removeDir(d.site.Dir))
	}
	return last, err
}

// removeDir removes a directory for good. Goroutines of Caddy that its stop does not wait for (one that stores a
// certificate, one that tidies the storage) may still write into it and make it anew, if stopped right after the start.
func removeDir(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), removeTimeout)
	defer cancel()
	for {
		err := os.RemoveAll(dir)
		if sleep(ctx, settle) != nil {
			if err != nil {
				return fmt.Errorf("removing the temporary directory: %w", err)
			}
			return nil
		}
		if _, statErr := os.Stat(dir); err == nil && errors.Is(statErr, fs.ErrNotExist) {
			return nil
		}
	}
}

// show keeps the figures on the screen until the demo is to end.
func (d *demo) show(ctx context.Context, out *screen) {
	if d.options.duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.options.duration)
		defer cancel()
	}
	every := redrawPlain
	if out.live {
		every = redraw
	}
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	shown := 0 // errors of Caddy, in plain lines
	for out.err == nil {
		v := d.look()
		switch {
		case out.live:
			out.draw(block(d.options, d.site, v))
		case v.report.all.calls > 0:
			out.print(plainLine(d.site, v))
			if v.errors > shown {
				out.print(errorLine(v))
				shown = v.errors
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// look takes the figures of this moment.
func (d *demo) look() view {
	d.proxy.failed.poll()
	return view{
		report:  d.stats.report(),
		dials:   d.client.dials.Load(),
		open:    d.client.open.Load(),
		elapsed: time.Since(d.begin),
		errors:  d.proxy.failed.count,
		last:    d.proxy.failed.last,
	}
}
