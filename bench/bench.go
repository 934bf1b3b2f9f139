package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// bench runs the measurements. Children are the processes it has started.
type bench struct {
	caddy     string
	before    string
	core      string
	tls       bool // between load and proxy
	duration  time.Duration
	accessLog bool
	admin     string
	block     string

	backends []string
	dir      string
	mu       sync.Mutex
	children []*exec.Cmd
}

// key names one cell of the result.
type key struct{ measure, proxy string }

func (b *bench) run(names, shapes, extras []string, rounds int) error {
	var err error
	if b.dir, err = os.MkdirTemp("", "grpc_proxy-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	if err := b.certificate(); err != nil {
		return err
	}
	for range 2 {
		addr, err := b.startBackend()
		if err != nil {
			return err
		}
		b.backends = append(b.backends, addr)
	}
	var running []string
	for _, n := range names {
		p, ok := proxies[n]
		if !ok {
			return fmt.Errorf("there is no proxy %q", n)
		}
		if v := p.version(b); v != "" {
			fmt.Printf("%-14s %s\n", n, v)
			running = append(running, n)
		} else {
			fmt.Printf("%-14s is not installed, left out\n", n)
		}
	}
	var measures []measure
	for _, s := range shapes {
		m, err := unary(s)
		if err != nil {
			return err
		}
		measures = append(measures, m)
	}
	for _, e := range extras {
		m, ok := further[e]
		if !ok {
			return fmt.Errorf("there is no measurement %q", e)
		}
		measures = append(measures, m)
	}
	results := make(map[key][]float64)
	for r := range rounds {
		for _, m := range measures {
			for i := range running {
				n := running[i]
				if r%2 == 1 { // who comes second on a machine that drifts must not always be the same
					n = running[len(running)-1-i]
				}
				v, err := b.measure(m, proxies[n])
				if err != nil { // a proxy that cannot carry the load must not hide what the others do
					fmt.Fprintf(os.Stderr, "round %d  %-22s %-14s failed: %v\n", r+1, m.name, n, err)
					continue
				}
				results[key{m.name, n}] = append(results[key{m.name, n}], v)
				fmt.Fprintf(os.Stderr, "round %d  %-22s %-14s %10.2f %s\n", r+1, m.name, n, v, m.unit)
			}
		}
	}
	report(measures, running, results)
	return nil
}

// measure runs one proxy for one measurement.
func (b *bench) measure(m measure, p proxy) (float64, error) {
	proc, addr, err := b.startProxy(p)
	if err != nil {
		return 0, err
	}
	defer b.end(proc)
	return m.run(b, proc.Process.Pid, p.workers, addr)
}

func report(measures []measure, names []string, results map[key][]float64) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\nmeasure\tunit\t%s\t\n", strings.Join(names, "\t"))
	for _, m := range measures {
		fmt.Fprintf(w, "%s\t%s\t", m.name, m.unit)
		base := results[key{m.name, names[0]}]
		for i, n := range names {
			values := results[key{m.name, n}]
			switch v := median(values); {
			case len(values) == 0:
				fmt.Fprint(w, "failed\t")
			case i == 0:
				fmt.Fprintf(w, "%.2f\t", v)
			default:
				fmt.Fprintf(w, "%.2f (×%.2f)\t", v, ratio(values, base))
			}
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	fmt.Printf("\nmedians of the rounds; in brackets the median of the rounds' ratios to %s\n", names[0])
}

// ratio is the median of the rounds' ratios: the machine's speed drifts less within a round than over all of them. Where a
// round has failed, they do not pair, and it is the ratio of the medians.
func ratio(v, base []float64) float64 {
	if len(v) != len(base) {
		return median(v) / median(base)
	}
	ratios := make([]float64, len(v))
	for i := range v {
		ratios[i] = v[i] / base[i]
	}
	return median(ratios)
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if len(s) == 0 {
		return 0
	}
	return (s[len(s)/2] + s[(len(s)-1)/2]) / 2
}

// spawn starts a child that ends with the bench.
func (b *bench) spawn(cmd *exec.Cmd) error {
	if err := cmd.Start(); err != nil {
		return err
	}
	b.mu.Lock()
	b.children = append(b.children, cmd)
	b.mu.Unlock()
	return nil
}

func (b *bench) end(cmd *exec.Cmd) {
	_ = cmd.Process.Signal(os.Interrupt)
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(3 * time.Second):
		_ = cmd.Process.Kill()
		<-done
	}
	b.mu.Lock()
	b.children = slices.DeleteFunc(b.children, func(c *exec.Cmd) bool { return c == cmd })
	b.mu.Unlock()
}

func (b *bench) stop() {
	b.mu.Lock()
	children := slices.Clone(b.children)
	b.mu.Unlock()
	for _, c := range children {
		_ = c.Process.Kill()
		_ = c.Wait()
	}
}

var errNotReady = errors.New("it does not serve")
